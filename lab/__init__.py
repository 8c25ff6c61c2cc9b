"""The equipment around the course: data, world, runs, reports. Nothing here is taught."""
