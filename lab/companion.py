"""The task of the preset `real`: a chat model learns to be a supportive companion.

`rows("train")` and `rows("eval")` hold everyday troubles. Train rows carry the answer of
a volunteer; a share GOOD of these answers is good, and the others have one human flaw each.
`explain(prompt, answer)` judges any answer by six parts, each True or False:

    supportive  its statements sound kind (VADER), and it does not play the trouble down
    names       it says which trouble or which feeling this is, and not as if it were its own
    offers      it asks the person something, or offers to listen
    human       it does not speak as a program, a hotline or a form letter
    brief       it has 5 to 45 words and does not repeat itself
    complete    it consists of whole sentences, and the last one ends

The rule reads words, not meaning. It cannot see whether an answer is true, wise or consistent, or
whether its question has to do with the trouble: a kind and fluent answer that misunderstands the
trouble gets all six parts, and so does one warm sentence with a single word changed for each
prompt. VADER takes words like "increase" for kind and "without your best friend" for unkind. The
rule knows the feelings of the troubles in situations.txt; to any other trouble every feeling fits.
It reads English only.
"""

import random
import re
from functools import cache, lru_cache
from pathlib import Path

from lab import CourseError

FOLDER = Path(__file__).resolve().parents[1] / "dataset" / "companion"
TEMPLATE = "Human: {} Assistant:"
FRAMES = {"train": 5, "eval": 4}  # rows of each situation
GOOD = 0.35  # share of good answers among the volunteers' answers

FLAWS = {  # a volunteer's flaw -> the part of the rule that it breaks
    "advice": "offers",  # gives a list of advice that nobody asked for
    "oneself": "names",  # talks about oneself
    "minimises": "supportive",  # plays the trouble down
    "never asks": "offers",
    "long": "brief",
    "breaks off": "complete",
}

# --------------------------------------------------------------------------------------------------
# Words

# feeling | words that follow "you feel" | all words for it (* is any ending) | close feelings
FEELINGS = """
sad | sad, down, unhappy | sad sadness sorrow* unhapp* miss missing | grief lonely disappointed
grief | heartbroken, empty, sad | grie* mourn* heartbr* loss missing empty emptiness | sad lonely
lonely | lonely, isolated | lone* alone isolat* left-out unseen invisible | sad
worried | worried, anxious, uneasy, nervous | worr* anxi* uneas* nerv* concern* | scared stressed
scared | scared, afraid, frightened | scared scary afraid fear* fright* terrif* panic* | worried
ashamed | ashamed, embarrassed, mortified | asham* shame* embarras* humiliat* mortif* | guilty
angry | angry, furious, frustrated | angry anger furious frustrat* annoy* unfair* irritat* | jealous
hurt | hurt, upset, crushed | hurt* upset* crush* wound* reject* sting* stung | sad angry lonely
guilty | guilty, ashamed, remorseful | guilt* remors* regret* conscience | ashamed
stressed | overwhelmed, stressed, tense | overwhelm* stress* tense tension pressure* | worried tired
tired | tired, exhausted, drained, worn out | tired* tiring exhaust* drain* worn | stressed
torn | torn, unsure, undecided | torn unsure undecid* uncertain* confus* conflicted | worried
insecure | insecure, discouraged, unsure of yourself | insecur* discourag* unsure doubt* | ashamed
jealous | jealous, envious | jealous* envious envy | insecure
disappointed | disappointed, let down, deflated | disappoint* let-down deflat* discourag* | sad
lost | lost, adrift, empty | lost adrift empty emptiness aimless* | sad torn
"""
FEELINGS = dict(row.split(" | ", 1) for row in FEELINGS.strip().splitlines())
FEELINGS = {name: tuple(row.split(" | ")) for name, row in FEELINGS.items()}
FAMILIES = [  # a feeling of another family is not the feeling of this trouble
    "sad grief lonely hurt disappointed lost insecure",
    "worried scared stressed tired torn lost insecure jealous",
    "ashamed guilty insecure hurt",
    "angry jealous hurt disappointed stressed",
]
SAME = """
mother mom mum mummy mommy mama
father dad daddy papa
grandmother grandma granny
child children kid kids
dog dogs puppy pup
manager boss supervisor
colleague colleagues coworker coworkers
flat apartment
test tests exam exams finals
die died dead death dying
lost lose losing loss
break broke broken
forget forgot forgotten
hide hid hidden hiding
sell sold
speak spoke spoken
wake woke awake
marry married marriage wedding
sleep slept asleep
"""
SAME = {word: row.split()[0] for row in SAME.strip().splitlines() for word in row.split()}
FUNCTION = set(
    "a about after again against all almost also always am an and any anyone anything are as at "
    "be because been before being both but by can can't cannot could couldn't did didn't do "
    "does doesn't doing don't down each enough ever every everyone everything few for from had "
    "has hasn't have haven't having he her here hers him his how i i'd i'll i'm i've if in into "
    "is isn't it it's its just let like many may maybe me might more most much must my never no "
    "nobody not nothing now of off often on once one only or other our out over own perhaps "
    "quite rather really shall she should so some someone something sometimes still such than "
    "that that's the their them then there there's these they they're this those though through "
    "to together too under until up us very want was wasn't we we're well were what what's when "
    "where which while who why will with without won't would wouldn't yes yet you you'd you'll "
    "you're you've your yours yourself dont im cant ive didnt its doesnt".split()
)
VAGUE = set(  # words of a prompt that could stand in any answer
    "answer around ask away back bad behind best better big bought bring call came close come "
    "comes day did early eight end even everybody face far feel feeling feelings felt find "
    "first five found four friday front gave get give go gone good got great half happen happy "
    "hard hear help home hope hour instead keep kind know last late least leave left less lie "
    "life little long look looks love made make man matter mean mind minute moment monday month "
    "morning myself need needs new next nice night nine normal number old open past people "
    "person place put reason right said same saturday say second see seven share side silly "
    "since sit six small someone sorry start stay still stop sunday support sure take talk tell "
    "ten thank thing think thought three time today told tomorrow tonight try turn twenty two "
    "understand wait way week whole whose wish woman won't word work world write wrong year "
    "yesterday young".split()
)
HARD = "awful bad difficult dreadful hard heavy horrible overwhelming painful rough terrible tough"
HARD = HARD.split()
TROUBLE = {  # words that name a trouble say nothing about the tone of an answer
    *"alone cry crying dead death died hurts lose losing lost no ouch pain problem".split(),
    *"problems tears trouble weakness worse worst".split(),
    *HARD,
}


def one_of(words):
    """Returns the pattern of any of the words; * is any ending, - a space or a hyphen."""
    found = "|".join(word.replace("-", "[ -]").replace("*", r"\w*") for word in words)
    return re.compile(rf"\b(?:{found})\b", re.IGNORECASE)


ANY_FEELING = one_of(sorted({w for _, words, _ in FEELINGS.values() for w in words.split()}))
SUPPORT = re.compile(  # support that VADER does not hear
    rf"""\bi'?m\ ((so|very|truly|really|deeply)\ )*sorry\b(?!,?\ (but|i\ can))
    | \b(here\ for\ you | here\ to\ (listen|support) | not\ alone | no\ wonder
      | of\ course\ you('\w+)? | understandable | i\ (get|hear|understand)\ (it|you)
      | on\ your\ side | heart\ goes\ out
      | i\ (can\ )?(hear|see|imagine|understand)\ (how|why) | right\ to\ feel | it\ takes\ courage
      | makes?\ sense | glad\ (that\ )?you\ (told|wrote|shared)
      | thank\ you\ for\ (telling|sharing|trusting) )\b
    | \b(it|that|this)(\ is|'s)(\ \w+)?\ (okay|ok|natural|normal|human|fair)\ (to|that|if|for)\b
    | \b(must|sounds?|seems?|feels?|can\ be|would\ be|is|it's|that's|makes?\ sense)
      (\ (be|feel|have|been|felt|like|so|very|really|incredibly|quite|such|a|an))*
      \ ({ANY_FEELING.pattern} | {one_of(HARD).pattern})""",
    re.IGNORECASE | re.VERBOSE,
)
MINIMISES = one_of(
    "not-that-bad not-so-bad no-big-deal real-problems over-it overreact* cheer-up be-worse "
    "too-much-of-it make-a-fuss toughen-up man-up calm-down worse-off worse-than stop-whining "
    "stop-crying just-relax just-smile be-happy your-own-fault too-sensitive goes-through-that "
    "go-through-that life-goes-on".split()
)
OFFERS = re.compile(
    r"""\b(i'm|i\ am|i'll\ be)\ (always\ |right\ )?(here|listening|all\ ears)\b
    | \b(happy|glad|ready|here)\ to\ listen\b | \bi('ll|\ will|\ can|\ could)(\ \w+)?\ listen\b
    | \blet\ me\ know\b | \btell\ me\ (more|about|if|whatever|whenever|everything)\b
    | \byou\ can(\ \w+)?\ (tell|talk\ to|write\ to)\ me\b | \bwe\ can\ talk\b | \btalk\ to\ me\b
    | \b(i'd|i\ would)\ (love|like)\ to\ hear\b | \bhow\ can\ i\ help\b""",
    re.IGNORECASE | re.VERBOSE,
)
ASKS_FOR_ITSELF = one_of("should-i i-should help-me advise-me do-i am-i my".split())
MACHINE = re.compile(
    r"""\b( ai | language\ model | chat\ ?bot | algorithm\w* | program | programmed | training\ data
      | (virtual|helpful)\ assistant | as\ an\ assistant | not\ (a\ )?human | assist | assistance
      | i('m|\ am)\ (just\ |only\ )?an?\ (machine|computer|bot|assistant|robot)
      | don't\ have\ (personal\ )?(feelings|emotions|opinions) | how\ (can|may)\ i\ help\ you\ today
      | i('m|\ am)\ sorry,?\ but\ i | unable\ to\ (help|assist|provide|offer)
      | i\ (can't|cannot)\ (help\ (you|with)|provide|offer|engage|fulfil) )\b
    | \[[^\]]*\] | ^(dear|subject)\b | \b(human|user|assistant|system): | <\|""",
    re.IGNORECASE | re.VERBOSE,
)
YOU_FEEL = re.compile(  # the answer says which feeling it is
    r"\b(feel|feels|feeling|be|being|are|you're|so|how|very|really|sounds?|(leave|make)s? you) ("
    + "|".join(sorted({word for row in FEELINGS.values() for word in row[0].split(", ")}))
    + r")\b",
    re.IGNORECASE,
)
CONFESSES = re.compile(  # the answer speaks of feelings as the person would
    rf"\bi('m| am|'ve been| have been| was| feel| felt)( (so|very|really|just|also|still|too|quite"
    rf"|feeling|getting|such|a|bit))* {ANY_FEELING.pattern}",
    re.IGNORECASE,
)
COMFORTS = re.compile(  # words for a feeling that do not say what the person feels
    r"\bi('m| am) (\w+ )?(sad|upset|concerned|worried|afraid) (to|for|that|about)\b"
    r"|\bnot alone\b|\bdon't (worry|be afraid to)\b|\bno (doubt|pressure)\b"
    r"|\b(nothing|not|reason|have|need) to (be|feel) \w+",
    re.IGNORECASE,
)
FEWEST, MOST = 5, 45  # words of an answer
TONE = 0.3  # VADER score from which statements sound kind; -TONE with words of support
GUSH = 0.25  # share of strongly positive words from which they sound false
COPIED = 6, 10  # words in a row copied from the prompt: with a word like "my", without one
CHAIN = 5  # words in a row without any function word

# --------------------------------------------------------------------------------------------------
# Rows


@cache
def table(name):
    """Returns the lines of a text file as tuples of columns."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [tuple(map(str.strip, line.split("|"))) for line in lines if line and line[0] != "#"]


@cache
def sentences():
    """Returns {use: sentences} of sentences.txt."""
    found = {}
    for use, sentence in table("sentences.txt"):
        found.setdefault(use, []).append(sentence)
    return found


def rows(split, seed=0):
    """Returns the rows of "train" or "eval"; no situation is in both."""
    if split not in FRAMES:
        raise CourseError(f"split = {split!r} is not known: choose from {', '.join(FRAMES)}.")
    rng, found = random.Random(f"{seed} {split}"), []
    for number, line in enumerate(table("situations.txt")):
        if line[0] != split:
            continue
        _, topic, feeling, text, thing, question = line
        for prompt in frames(text, feeling, FRAMES[split], rng):
            found.append({"prompt": TEMPLATE.format(prompt), "trouble": topic, "feeling": feeling})
            found[-1] |= {"situation": number}
    rng.shuffle(found)
    if split == "train":
        used = set()
        for row in found:
            row["response"], row["flaw"] = demonstration(row, rng, used)
    return found


def frames(text, feeling, count, rng):
    """Returns `count` different prompts of one situation: openers, closers, careless typing."""
    found, own = {}, FEELINGS[feeling][0].split(", ")
    while len(found) < count:
        opener = rng.choice(sentences()["opener"]) if rng.random() < 0.3 else ""
        closer = rng.choice(sentences()["closer"]) if rng.random() < 0.7 else ""
        prompt = " ".join(filter(None, (opener, text, closer.format(adj=rng.choice(own)))))
        careless = rng.random()
        if careless < 0.15:
            prompt = prompt.lower().rstrip(".")
        if careless < 0.07:
            prompt = prompt.replace("'", "")
        found[key(prompt)] = prompt
    return list(found.values())


def demonstration(row, rng, used):
    """Returns a volunteer's answer and its flaw; the answer is in no other row."""
    flaw = "none" if rng.random() < GOOD else rng.choice(list(FLAWS))
    for _ in range(300):
        answer = draft(row, flaw, rng)
        verdict = explain(row["prompt"], answer)
        fits = all(verdict.values()) if flaw == "none" else not verdict[FLAWS[flaw]]
        if answer and fits and answer not in used:
            used.add(answer)
            return answer, flaw
    raise CourseError(f"No answer with the flaw {flaw!r} fits {row['prompt']!r}: add sentences.")


def draft(row, flaw, rng):
    """Returns one random answer with (or without) a flaw, or "" if its length is wrong."""
    _, topic, feeling, _, thing, question = table("situations.txt")[row["situation"]]
    adjectives = FEELINGS[feeling][0].split(", ")
    adjectives = [adj for adj in adjectives if adj not in row["prompt"]] or adjectives

    def say(use, count=1):
        adj = rng.choice(adjectives)
        chosen = rng.sample(sentences()[use], count)
        return [s.format(thing=thing, Thing=thing[0].upper() + thing[1:], adj=adj) for s in chosen]

    name, warm = say("name"), say(rng.choice(["warm", "warm." + feeling]))
    ask = [question] if rng.random() < 0.6 else say("ask")
    if flaw == "advice":
        parts = say("name", rng.randint(0, 1)) + say("advice." + topic, rng.randint(2, 3))
    elif flaw == "oneself":
        parts = say("self", rng.randint(2, 3))
    elif flaw == "minimises":
        parts = say("minimise", rng.randint(2, 3))
    elif flaw == "never asks":
        parts = name + warm
    elif flaw == "long":
        parts = name + warm + say("advice." + topic, 2) + say("self") + ask
    else:
        parts = rng.choice([name + ask, name + warm + ask, say("warm." + feeling) + ask])
    words = " ".join(parts).split()
    if flaw == "breaks off":
        words = words[: rng.randint(6, len(words) - 2)]
        words[-1] = words[-1].rstrip(".,:;?!")
    low, high = {"none": (12, 40), "long": (46, 70)}.get(flaw, (5, 45))
    return " ".join(words) if low <= len(words) <= high else ""


# --------------------------------------------------------------------------------------------------
# The rule


@cache
def analyser():
    """Returns the VADER analyser, loaded once."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def unframed(prompt):
    """Returns what the person typed, without the frame of the dialogue (plain or ChatML)."""
    turns = re.findall(r"<\|im_start\|>user\n(.*?)(?:<\|im_end\|>|$)", prompt, re.DOTALL)
    turns = turns or re.findall(r"Human:(.*?)(?:Assistant:|$)", prompt, re.DOTALL)
    return " ".join(turn.strip() for turn in turns or [prompt])


def words_of(text):
    """Returns the words of a text in small letters."""
    return re.findall(r"[a-z]+(?:['-][a-z]+)*", text.lower().replace("’", "'"))


def split_sentences(text):
    return [part for part in re.split(r"(?<=[.!?])[\"')]*\s+", text.strip()) if part]


@cache
def stem(word):
    """Returns a word without its usual endings, so that "moved" and "moving" are the same."""
    word = SAME.get(word.removesuffix("'s"), word.removesuffix("'s"))
    for ending in ("ment", "ing", "ion", "ed", "es", "al", "ly", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    word = word.removesuffix("e") if len(word) > 3 else word
    return re.sub(r"(.)\1$", r"\1", re.sub(r"y$", "i", word))


@cache
def common():
    """Returns the stems of words that say nothing about a trouble: vague ones and the frames'."""
    frames = " ".join(sentences()["opener"] + sentences()["closer"])
    return {stem(word) for word in FUNCTION | VAGUE | {*words_of(frames)}}


@lru_cache(maxsize=4096)
def topic_words(prompt):
    """Returns the stems of the words that tell this trouble from others."""
    return {*map(stem, words_of(prompt))} - common()


@cache
def known_feelings():
    """Returns {words of a situation: its feeling}."""
    return {key(line[3]): line[2] for line in table("situations.txt")}


def key(text):
    """Returns the words of a text as one string that careless typing does not change."""
    return " ".join(words_of(text)).replace("'", "")


@lru_cache(maxsize=4096)
def feeling_of(prompt):
    """Returns the feeling of a known trouble, or None."""
    text = key(prompt)
    return next((f for situation, f in known_feelings().items() if situation in text), None)


@cache
def feeling_words(feeling):
    """Returns two patterns for a feeling: words that name it, and words that are akin to it.

    To a trouble that is not known any feeling fits.
    """
    if feeling is None:
        return ANY_FEELING, re.compile(".*")
    close = {feeling, *FEELINGS[feeling][2].split()}
    akin = close.union(*(f.split() for f in FAMILIES if feeling in f.split()))
    akin_words = {word for name in akin for word in FEELINGS[name][0].split(", ")}
    return one_of(sorted({w for n in close for w in FEELINGS[n][1].split()})), one_of(
        sorted(akin_words)
    )


def sounds_kind(prompt, answer):
    """Tells whether the statements of an answer are kind. Words for the trouble do not count."""
    if MINIMISES.search(answer):
        return False
    statements = " ".join(s for s in split_sentences(answer) if not s.endswith("?"))
    topic, lexicon = topic_words(prompt), analyser().lexicon
    kept = [
        word
        for word in ANY_FEELING.sub(" ", statements).split()
        if not {*words_of(word)} & TROUBLE and not {*map(stem, words_of(word))} & topic
    ]
    tone = analyser().polarity_scores(" ".join(kept))["compound"]
    strong = [word for word in words_of(statements) if lexicon.get(word, 0) > 1.5]
    gushes = len(strong) > max(2, GUSH * len(words_of(statements)))
    return tone >= (-TONE if SUPPORT.search(statements) else TONE) and not gushes


def names_it(prompt, answer):
    """Tells whether a whole sentence of the answer names the trouble or a fitting feeling.

    An answer that copies the prompt, speaks as if it had the trouble itself, or names a feeling
    that is foreign to the trouble does not.
    """
    topic, text = topic_words(prompt), COMFORTS.sub(" ", answer)
    fitting, akin = feeling_words(feeling_of(prompt))
    if CONFESSES.search(text) or copies(words_of(prompt), words_of(answer), topic):
        return False
    if not all(akin.fullmatch(found[3]) for found in YOU_FEEL.finditer(text)):
        return False
    feeling = ANY_FEELING.search(text)  # the first one counts: a list of feelings names nothing
    fits = feeling and fitting.fullmatch(feeling[0])
    for sentence in split_sentences(text):
        words = words_of(sentence)
        whole = len(words) >= 4 and any(word in FUNCTION for word in words)
        if whole and (topic & {*map(stem, words)} or fits and feeling[0] in sentence):
            return True
    return False


def copies(asked, said, topic):
    """Tells whether an answer copies the prompt, or says "my" of what is the person's."""
    mine, yours = (
        {stem(b) for a, b in zip(words, words[1:]) if a == "my"} & topic for words in (said, asked)
    )
    short, long = (runs(said, count) & runs(asked, count) for count in COPIED)
    return bool(mine & yours or long or any({"i", "i'm", "i've", "me", "my"} & {*r} for r in short))


def runs(words, count):
    """Returns all runs of `count` words."""
    return {tuple(words[i : i + count]) for i in range(len(words) - count + 1)}


def offers_an_ear(answer):
    """Tells whether the answer asks the person something or offers to listen."""
    for sentence in split_sentences(answer):
        words = {*words_of(sentence)}
        to_you = words & {"you", "your", "you're", "you've"} or not words & {"i", "me", "my", "we"}
        asks = sentence.endswith("?") and len(words) >= 3 and to_you
        if asks and not ASKS_FOR_ITSELF.search(sentence):
            return True
    return bool(OFFERS.search(answer))


def is_brief(answer):
    """Tells whether the answer has the right length and says nothing twice."""
    words = words_of(answer)
    fours = list(zip(*(words[i:] for i in range(4))))
    return FEWEST <= len(answer.split()) <= MOST and len(set(fours)) == len(fours)


def is_complete(answer, ended):
    """Tells whether the answer is made of sentences and ends; a list of words is not a sentence."""
    if not ended or not answer.rstrip("\"') ").endswith((".", "!", "?")):
        return False
    chain = 0
    for word in re.findall(r"[a-z'-]+|[.!?]", answer.lower()):
        chain = 0 if word in FUNCTION or word in ".!?" else chain + 1
        if chain > CHAIN:
            return False
    words = words_of(answer)
    return sum(word in FUNCTION for word in words) >= 0.3 * len(words) > 0


def explain(prompt, answer, ended=True):
    """Returns {part: True or False} for one answer.

    `ended` tells whether the model ended the answer by itself, if that is known.
    """
    prompt, answer = unframed(prompt), answer.strip().replace("\u2019", "'")
    return {
        "supportive": sounds_kind(prompt, answer),
        "names": names_it(prompt, answer),
        "offers": offers_an_ear(answer),
        "human": not MACHINE.search(answer),
        "brief": is_brief(answer),
        "complete": is_complete(answer, ended),
    }


# --------------------------------------------------------------------------------------------------
# Rewards


def parts(prompts, responses):
    """Returns the share of the six parts that each answer has."""
    return [sum(explain(*pair).values()) / 6 for pair in zip(prompts, responses)]


def whole(prompts, responses):
    """Returns 1 for each answer that has all six parts, else 0."""
    return [float(all(explain(*pair).values())) for pair in zip(prompts, responses)]


def supportive(prompts, responses):
    """Returns 1 for each answer that sounds supportive, else 0; the mean is the empathy ratio."""
    return [float(explain(*pair)["supportive"]) for pair in zip(prompts, responses)]
