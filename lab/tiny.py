"""The embedded model `tiny`: its tokenizer, its architecture, and its pretraining blocks."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from lab.tokens import FRAME


def train_tokenizer(texts, vocab_size):
    """Trains a byte-level BPE tokenizer, which can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="</s>",
        chat_template=FRAME,
    )


def tiny_model(cfg, tokenizer):
    """Builds a small OPT with random weights.

    The weights have the standard deviation cfg.init_std. At this hidden size, OPT's default of 0.02
    makes the model learn to copy much later.
    """
    shape = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden_size,
        word_embed_proj_dim=cfg.hidden_size,
        ffn_dim=4 * cfg.hidden_size,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        max_position_embeddings=cfg.pretrain_length,
        init_std=cfg.init_std,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return OPTForCausalLM(shape)


def blocks(tokenizer, texts, cfg):
    """Joins all documents and cuts them into blocks of equal length, (N, pretrain_length)."""
    ids = tokenizer([f"{question} {answer}" for question, answer in texts])["input_ids"]
    stream = torch.tensor([token for doc in ids for token in (*doc, tokenizer.eos_token_id)])
    usable = len(stream) // cfg.pretrain_length * cfg.pretrain_length
    return stream[:usable].view(-1, cfg.pretrain_length)
