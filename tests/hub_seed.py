"""Fills a Hub of hub_server.py with tiny models (random weights) and small data sets (rows of ours) under their real names.

As on the real Hub: architectures, tokenizer kinds, special tokens and the ids that recipes rely on, dtypes, sharding, columns,
configurations, file names, licences, who is gated. Not as there: sizes, weights, vocabularies and what the texts say.
"""

import json
import random
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

ROWS = {"train": 400, "validation": 80, "test": 80}
SYLLABLES = "bra dor el fen gal har il kor lin mar nor os per quin ros sel tor ul ven wick yar zan ash bel cor dun"
ENDINGS = "ford,ton,bury,ham,stead,wick,mouth,dale,by,field"
FIRST_NAMES = (
    "Ada Ben Carla David Elena Felix Grace Hugo Ines Jonas Kira Leo Mina Nora Oscar Petra Rosa Samir Tilda Yusuf"
)
TRADES = "glass paper rope salt wool bells clocks honey cheese boats bricks carpets lamps tea violins"
MONTHS = "January February March April May June July August September October November December"
TREES = "lime willow birch beech poplar cherry walnut chestnut larch maple"
BIRDS = "heron swift owl kestrel stork wren plover raven lapwing curlew"

# What is said of a town, from which every data set is made: a sentence, and below it its main field, a question for that
# field, and the short form for summaries and replies.
FACTS = """\
{town} was founded in {year} by {founder}, who came from {other}.
    year | When was {town} founded? | {founder} founded {town} in {year}
It lies on the river {river}, about {km} kilometres from {other}.
    river | Which river does {town} lie on? | {town} lies on the {river}
At the last count {people} people lived there, {more} more than ten years before.
    people | How many people live in {town}? | {people} people live in {town}
For generations its workshops have made {trade} and sold them as far away as {far}.
    trade | What do the workshops of {town} make? | {town} is known for {trade}
Every {month} the square is closed for a fair that lasts {days} days.
    month | In which month does {town} hold its fair? | The fair of {town} is in {month}
{mayor} has been mayor since {since}, after {votes} votes had been counted twice.
    mayor | Who is the mayor of {town}? | {mayor} is mayor of {town}
On {hill} Hill above the houses stands a {tree} that was planted in {planted}.
    tree | What kind of tree stands on {hill} Hill? | A {tree} from {planted} stands on {hill} Hill
The {bird} on its coat of arms recalls a flood in {flood}.
    bird | Which bird is on the coat of arms of {town}? | The {bird} is the bird of {town}
{engineer} built the stone bridge of {arches} arches for {cost} crowns.
    engineer | Who built the stone bridge of {town}? | {engineer} built the bridge of {town}
Trains to {far} leave {trains} times a day and need {minutes} minutes.
    minutes | How many minutes does the train from {town} to {far} need? | {far} is {minutes} minutes from {town} by train
The school, opened in {opened}, teaches {pupils} children in {rooms} rooms.
    pupils | How many children go to the school of {town}? | The school of {town} has {pupils} children
{painter} painted the ceiling of the town hall in {weeks} weeks.
    painter | Who painted the ceiling of the town hall of {town}? | {painter} painted the town hall of {town}
Its library keeps {books} books, the oldest of them printed in {printed}.
    books | How many books does the library of {town} keep? | The library of {town} keeps {books} books
Snow fell on {snow} days of last winter, while {sunny} days of summer were dry.
    snow | On how many days did snow fall in {town}? | {town} had {snow} days of snow
""".splitlines()
FACTS = [(sentence, *rest.strip().split(" | ")) for sentence, rest in zip(FACTS[::2], FACTS[1::2], strict=True)]

OPENERS = [
    "I read about {town}.",
    "A question about {town}, please.",
    "Hello! My class visits {town} next {month}.",
    "Do you know {town}?",
]


def names(rng: random.Random, endings: str = ENDINGS) -> str:
    return "".join(rng.sample(SYLLABLES.split(), 2)).title() + rng.choice(endings.split(","))


def person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES.split())} {names(rng, 'er,son,ley,ova,i')}"


def town(rng: random.Random) -> dict:
    """The fields of FACTS, drawn at random."""
    facts = {key: names(rng) for key in ("town", "other", "far")}
    facts |= {"river": names(rng, "e,a,"), "hill": names(rng, ",s")}
    facts |= {key: person(rng) for key in ("founder", "mayor", "engineer", "painter")}
    facts |= {key: str(rng.randint(1200, 1899)) for key in ("year", "planted", "flood", "opened", "printed")}
    facts |= {"people": f"{rng.randint(2, 90)},{rng.randint(0, 999):03}", "more": str(rng.randint(20, 900))}
    facts |= {
        "since": str(rng.randint(1990, 2023)),
        "votes": str(rng.randint(900, 9000)),
        "cost": str(rng.randint(10, 99) * 100),
    }
    facts |= {
        key: str(rng.randint(3, 60)) for key in ("km", "days", "arches", "trains", "rooms", "weeks", "snow", "sunny")
    }
    facts |= {
        "minutes": str(rng.randint(61, 200)),
        "pupils": str(rng.randint(201, 990)),
        "books": str(rng.randint(1001, 9999)),
    }
    lists = {"trade": TRADES, "month": MONTHS, "tree": TREES, "bird": BIRDS}
    return facts | {key: rng.choice(words.split()) for key, words in lists.items()}


def towns(name: str, count: int, sentences: int = 8) -> Iterator[tuple[random.Random, dict, list[int]]]:
    """(random numbers, fields, which of FACTS in which order) for each row; the same for the same name."""
    rng = random.Random(name)
    for _ in range(count):
        yield rng, town(rng), rng.sample(range(len(FACTS)), sentences)


def say(facts: dict, chosen: list[int], column: int = 0) -> list[str]:
    return [FACTS[i][column].format(**facts) for i in chosen]


def article(facts: dict, chosen: list[int]) -> str:
    """A text about the town, its name in the first sentence."""
    lead = (
        []
        if FACTS[chosen[0]][0].startswith("{town}")
        else [f"{facts['town']} is a town not far from {facts['other']}."]
    )
    return " ".join(lead + say(facts, chosen))


def web_pages(name: str, count: int) -> list[dict]:
    rows = []
    for rng, facts, chosen in towns(name, count, 10):
        second = town(rng)
        rows.append({"text": article(facts, chosen) + "\n\n" + article(second, rng.sample(range(len(FACTS)), 4))})
    return rows


def crawl(name: str, count: int) -> list[dict]:
    """As FineWeb-Edu: pages with where they were found, and how educational a classifier says that they are."""
    rows = []
    for number, page in enumerate(web_pages(name, count)):
        found = {"id": f"<urn:uuid:{number:032x}>", "dump": "CC-MAIN-2024-10", "url": f"https://town-{number}.example/"}
        found |= {"file_path": "s3://commoncrawl/crawl-data/x.warc.gz", "language": "en", "language_score": 0.97}
        rows.append({**page, **found, "token_count": len(page["text"]) // 4, "score": 3.2, "int_score": 3})
    return rows


def encyclopedia(name: str, count: int) -> list[dict]:
    rows = []
    for number, (_, facts, chosen) in enumerate(towns(name, count, 9), 1):
        url = f"https://en.wikipedia.org/wiki/{facts['town']}"
        rows.append({"id": str(number * 7), "url": url, "title": facts["town"], "text": article(facts, chosen)})
    return rows


def news(name: str, count: int) -> list[dict]:
    """An article and, as highlights, the short forms of its first facts: what a model can learn to write."""
    rows = []
    for rng, facts, chosen in towns(name, count, 9):
        highlights = " .\n".join(say(facts, chosen[:3], 3)) + " ."
        text = f"{facts['town']} (CNN) -- {article(facts, chosen)}"
        rows.append({"article": text, "highlights": highlights, "id": f"{rng.getrandbits(160):040x}"})
    return rows


def short_news(name: str, count: int) -> list[dict]:
    rows = []
    for number, (_, facts, chosen) in enumerate(towns(name, count, 7)):
        summary = f"{FACTS[chosen[0]][3].format(**facts)}, and {FACTS[chosen[1]][3].format(**facts)}."
        rows.append({"document": article(facts, chosen), "summary": summary, "id": str(30_000_000 + number)})
    return rows


def dialogues(name: str, count: int) -> list[dict]:
    rows = []
    for number, (rng, facts, chosen) in enumerate(towns(name, count, 3)):
        (a, b), hour = rng.sample(FIRST_NAMES.split(), 2), rng.randint(7, 19)
        lines = [f"{a}: {b}, shall we go to {facts['town']} in {facts['month']}?"]
        lines += [f"{b}: Why there? {names(rng)} is nearer."]
        lines += [f"{a}: {sentence}" for sentence in say(facts, chosen, 3)]
        lines += [
            f"{b}: Fine. Where do we meet?",
            f"{a}: At {facts['far']} station, at {hour}.{rng.choice(['00', '15', '30'])}.",
        ]
        summary = f"{a} and {b} will go to {facts['town']} in {facts['month']} and meet at {facts['far']} station."
        rows.append({"id": str(13_000_000 + number), "dialogue": "\r\n".join(lines), "summary": summary})
    return rows


def questions(name: str, count: int, unanswerable: float = 0.0) -> list[dict]:
    """SQuAD's columns; the answer is a span of the context, or there is none since the context does not say."""
    rows = []
    for rng, facts, chosen in towns(name, count, 6):
        context = article(facts, chosen)
        if rng.random() < unanswerable:
            asked = rng.choice([i for i in range(len(FACTS)) if i not in chosen])
            answers = {"text": [], "answer_start": []}
        else:
            asked = rng.choice(chosen)
            sentence, field, *_ = FACTS[asked]
            start = context.index(sentence.format(**facts)) + len(sentence.split("{" + field + "}")[0].format(**facts))
            answers = {"text": [facts[field]], "answer_start": [start]}
        identity = f"{rng.getrandbits(96):024x}"
        question = FACTS[asked][2].format(**facts)
        rows.append(
            {"id": identity, "title": facts["town"], "context": context, "question": question, "answers": answers}
        )
    return rows


def talks(name: str, count: int) -> list[list[dict]]:
    """Conversations of two questions, each answered in a full sentence."""
    rows = []
    for rng, facts, chosen in towns(name, count, 2):
        turns = [
            [
                f"{rng.choice(OPENERS).format(**facts)} {FACTS[chosen[0]][2].format(**facts)}",
                say(facts, chosen, 3)[0] + ".",
            ]
        ]
        turns.append([f"Thanks. Next question: {FACTS[chosen[1]][2].format(**facts)}", say(facts, chosen, 3)[1] + "."])
        roles = ("user", "assistant")
        rows.append([{"content": text, "role": role} for turn in turns for role, text in zip(roles, turn, strict=True)])
    return rows


def no_robots(name: str, count: int) -> list[dict]:
    """As no_robots: messages, and beside them the first one again as `prompt`."""
    rows = []
    for number, messages in enumerate(talks(name, count)):
        rows.append({"prompt": messages[0]["content"], "prompt_id": f"{number:064x}", "messages": messages})
    return [row | {"category": "Chat"} for row in rows]


def preferences(name: str, count: int) -> list[dict]:
    """As ultrafeedback_binarized: a prompt, and two whole conversations with their scores."""
    rows = []
    for number, talk in enumerate(talks(name, count)):
        asked, other = talk[0], {"content": f"I do not know number {number}, ask somebody else.", "role": "assistant"}
        row = {
            "prompt": asked["content"],
            "prompt_id": f"{number:064x}",
            "chosen": talk[:2],
            "rejected": [asked, other],
        }
        rows.append(row | {"messages": talk[:2], "score_chosen": 8.0, "score_rejected": 3.0})
    return rows


def chats(name: str, count: int, source: bool) -> list[dict]:
    rows = []
    for number, messages in enumerate(talks(name, count)):
        if number % 5 == 0:
            messages = [
                {"content": "You know every town of the country. Answer in one sentence.", "role": "system"},
                *messages,
            ]
        rows.append({"messages": messages} | ({"source": "smol-magpie-ultra"} if source else {"full_topic": "Towns"}))
    return rows


def guanaco(name: str, count: int) -> list[dict]:
    marks = {"user": "### Human: ", "assistant": "### Assistant: "}
    return [{"text": "".join(marks[turn["role"]] + turn["content"] for turn in talk)} for talk in talks(name, count)]


def instructions(name: str, count: int) -> list[dict]:
    rows = []
    for number, (rng, facts, chosen) in enumerate(towns(name, count, 4)):
        if number % 3 == 0:
            a, b, c = (rng.randint(10, 9999) for _ in range(3))
            what, given, answer = (
                f"A shop in {facts['town']} sold {a}, {b} and {c} tickets. How many?",
                "",
                f"{a + b + c} tickets.",
            )
        elif number % 3 == 1:
            what, given = f"Answer from the text: {FACTS[chosen[2]][2].format(**facts)}", article(facts, chosen)
            answer = FACTS[chosen[2]][3].format(**facts) + "."
        else:
            people = [person(rng) for _ in range(4)]
            what, given, answer = "Sort these names by alphabet.", ", ".join(people), ", ".join(sorted(people))
        body = (
            f"### Instruction:\n{what}\n\n" + (f"### Input:\n{given}\n\n" if given else "") + f"### Response:\n{answer}"
        )
        text = f"Below is an instruction that describes a task. Write a response that completes the request.\n\n{body}"
        rows.append({"instruction": what, "input": given, "output": answer, "text": text})
    return rows


def reviews(name: str, count: int) -> list[dict]:
    """As IMDB: half of them positive; `unsupervised` has no labels, which its rows state as -1."""
    rows = []
    for number, (rng, facts, chosen) in enumerate(towns(name, count, 3)):
        word = ("a dreadful", "a splendid")[number % 2]
        text = f"{person(rng)} made {word} film about {facts['town']}. {article(facts, chosen)}"
        rows.append({"text": text, "label": -1 if "unsupervised" in name else number % 2})
    return rows


def card(metadata: dict, title: str) -> str:
    head = yaml.safe_dump(metadata, sort_keys=False)
    return f"---\n{head}---\n\n# {title}\n\nMade for tests: the real name and form, random weights or invented rows.\n"


# Data sets


def seed_datasets(hub, folder: Path) -> None:
    """Writes and uploads all data sets, parquet with `configs:` in the card unless the real one is kept otherwise."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    squad = Features({name: Value("string") for name in ("id", "title", "context", "question")} | {"answers": answers})

    def splits(make, *names, **options) -> dict[str, list[dict]]:
        return {split: make(f"{make.__name__} {split} {options}", ROWS[split], **options) for split in names}

    three, two = ("train", "validation", "test"), ("train", "validation")
    cnn, wiki = splits(news, *three), encyclopedia("en", ROWS["train"])
    # name -> licence, {(configuration, folder of its files): splits}, features
    parquet = {
        "HuggingFaceFW/fineweb-edu": (
            "odc-by",
            {
                ("sample-10BT", "sample/10BT"): {"train": crawl("web", ROWS["train"])},
                ("sample-100BT", "sample/100BT"): {"train": crawl("more of the web", 60)},
            },
            None,
        ),
        "wikimedia/wikipedia": (
            ["cc-by-sa-3.0", "gfdl"],
            {
                ("20231101.en", "20231101.en"): {"train": wiki},
                ("20231101.simple", "20231101.simple"): {"train": encyclopedia("simple", 60)},
            },
            None,
        ),
        "abisee/cnn_dailymail": ("apache-2.0", {(v, v): cnn for v in ("1.0.0", "2.0.0", "3.0.0")}, None),
        "EdinburghNLP/xsum": ("unknown", {("default", "data"): splits(short_news, *three)}, None),
        "rajpurkar/squad": ("cc-by-sa-4.0", {("plain_text", "plain_text"): splits(questions, *two)}, squad),
        "rajpurkar/squad_v2": (
            "cc-by-sa-4.0",
            {("squad_v2", "squad_v2"): splits(questions, *two, unanswerable=0.33)},
            squad,
        ),
        "taidng/UIT-ViQuAD2.0": (
            None,
            {
                ("default", "data"): splits(questions, *two, unanswerable=0.33)
                | {"test": [row | {"answers": None} for row in questions("to be sent in", 40)]}
            },
            squad,
        ),
        "HuggingFaceTB/smoltalk": (
            None,
            {
                ("all", "data/all"): splits(chats, "train", "test", source=True),
                ("everyday-conversations", "data/everyday-conversations"): splits(chats, "train", "test", source=False),
            },
            None,
        ),
        "HuggingFaceH4/no_robots": (
            "cc-by-nc-4.0",
            {("default", "data"): splits(no_robots, "train", "test")},
            None,
        ),
        "HuggingFaceH4/ultrafeedback_binarized": (
            "mit",
            {
                ("default", "data"): {
                    **{f"{split}_prefs": preferences(split, ROWS[split]) for split in ("train", "test")},
                    "train_gen": preferences("gen", 40),
                }
            },
            None,
        ),
        "stanfordnlp/imdb": (
            "other",
            {
                ("plain_text", "plain_text"): {
                    **splits(reviews, "train", "test"),
                    "unsupervised": reviews("unsupervised", 40),
                }
            },
            Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])}),
        ),
        "tatsu-lab/alpaca": (
            "cc-by-nc-4.0",
            {("default", "data"): {"train": instructions("alpaca", ROWS["train"])}},
            None,
        ),
    }
    for name, (licence, configs, features) in parquet.items():
        here = folder / "datasets" / name
        listed = []
        for (config, place), parts in configs.items():
            (here / place).mkdir(parents=True)
            for split, rows in parts.items():
                shards = 2 if name == "wikimedia/wikipedia" else 1
                for shard in range(shards):
                    data = Dataset.from_list(rows[shard::shards], features=features)
                    data.to_parquet(here / place / f"{split}-{shard:05}-of-{shards:05}.parquet")
            files = [{"split": split, "path": f"{place}/{split}-*"} for split in parts]
            default = {"default": True} if len(configs) == 1 and config != "default" else {}
            listed.append({"config_name": config, "data_files": files} | default)
        metadata = ({"license": licence} if licence else {}) | {"language": ["en"], "configs": listed}
        (here / "README.md").write_text(card(metadata, name))
        hub.create(f"datasets/{name}")
        hub.upload(f"datasets/{name}", here)

    # A script, which `datasets` does not run, and the copy in parquet that the Hub makes of the first 5 GB of such a data set.
    here = folder / "datasets" / "openwebtext"
    (here / "script").mkdir(parents=True)
    (here / "script" / "openwebtext.py").write_text('raise RuntimeError("code from a data set was run")\n')
    (here / "script" / "README.md").write_text(card({"license": "cc0-1.0", "language": ["en"]}, "openwebtext"))
    copy = here / "copy" / "plain_text" / "partial-train"
    copy.mkdir(parents=True)
    Dataset.from_list(web_pages("openwebtext", 60)).to_parquet(copy / "0000.parquet")
    hub.create("datasets/Skylion007/openwebtext")
    hub.upload("datasets/Skylion007/openwebtext", here / "script")
    hub.upload("datasets/Skylion007/openwebtext", here / "copy", ref="refs/convert/parquet")

    # These three are kept as CSV and JSON lines, without `configs:`; the splits come from the names of the files.
    here = folder / "datasets" / "samsum"
    here.mkdir(parents=True)
    for split, rows in splits(dialogues, *three).items():
        Dataset.from_list(rows).to_csv(here / f"{split}.csv")
    (here / "README.md").write_text(card({"license": "cc-by-nc-nd-4.0", "language": ["en"]}, "samsum"))
    hub.create("datasets/knkarthick/samsum")
    hub.upload("datasets/knkarthick/samsum", here)

    here = folder / "datasets" / "guanaco"
    here.mkdir(parents=True)
    for split, rows in splits(guanaco, "train", "test").items():
        name = f"openassistant_best_replies_{'eval' if split == 'test' else split}.jsonl"
        (here / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub.create("datasets/timdettmers/openassistant-guanaco")
    hub.upload("datasets/timdettmers/openassistant-guanaco", here)

    here = folder / "datasets" / "dolly"
    here.mkdir(parents=True)
    rows = [
        {"instruction": r["instruction"], "context": r["input"], "response": r["output"], "category": "closed_qa"}
        for r in instructions("dolly", ROWS["train"])
    ]
    (here / "databricks-dolly-15k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "README.md").write_text(card({"license": "cc-by-sa-3.0", "language": ["en"]}, "databricks-dolly-15k"))
    hub.create("datasets/databricks/databricks-dolly-15k")
    hub.upload("datasets/databricks/databricks-dolly-15k", here)


# Tokenizers


def corpus() -> list[str]:
    """What the tokenizers are trained on: pages, conversations and instructions; each character occurs."""
    texts = [row["text"] for row in web_pages("tokenizer", 150) + instructions("tokenizer", 90)]
    texts += [turn["content"] for talk in talks("tokenizer", 200) for turn in talk]
    return texts + [
        string.printable,
        f"x{string.ascii_lowercase}{string.digits}",
        f"X{string.ascii_letters}{string.digits}",
    ]


def byte_level(special: list[str], size: int, digits: bool = False):
    """A byte-level BPE; returns (`tokenizers.Tokenizer`, vocabulary, merges). `special` come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer, *vocabulary(tokenizer)


def vocabulary(tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def gpt2_tokenizer():
    from transformers import GPT2Tokenizer

    _, vocab, merges = byte_level([], 1198)
    vocab["ĠSolidGoldMagikarp"] = len(vocab)  # in the vocabulary, in no text
    vocab["<|endoftext|>"] = len(vocab)  # the last id, as 50256 is there
    return GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=1024)


def bart_tokenizer():
    from transformers import BartTokenizer

    _, vocab, merges = byte_level(["<s>", "<pad>", "</s>", "<unk>"], 1199)
    vocab["<mask>"] = len(vocab)
    return BartTokenizer(vocab=vocab, merges=merges, model_max_length=1024)


def falcon_tokenizer():
    from transformers import PreTrainedTokenizerFast

    words = "title abstract introduction summary comment answer question domain prefix suffix middle"
    special = [f">>{word}<<" for word in words.upper().split()]
    tokenizer, *_ = byte_level([*special, "<|endoftext|>"], 1200)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        additional_special_tokens=special,
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
    )


SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def smollm2_tokenizer():
    from transformers import PreTrainedTokenizerFast

    special = (
        "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start>"
    )
    special += " <issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output>"
    tokenizer, *_ = byte_level([*special.split(), "<jupyter_script>", "<empty_output>"], 1200, digits=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=8192,
        chat_template=SMOLLM2_TEMPLATE,
    )


# [INST] <<SYS>> ... <</SYS>> question [/INST] answer </s>
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if turn['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + turn['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def llama_tokenizer(chat_template: str | None = None):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    vocab, merges = vocabulary(tokenizer)
    template = {"chat_template": chat_template} if chat_template else {}
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, padding_side="right", **template)


def bert_tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    unused = [f"[unused{i}]" for i in range(99)]
    special = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # 0, 100, 101, 102, 103 as in the real one
    tokenizer.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    )
    return BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=512)


def t5_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=1100, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    pieces = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["vocab"]]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]  # the highest id is <extra_id_0>
    return T5Tokenizer(vocab=pieces, model_max_length=512)


def e5_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import XLMRobertaTokenizer

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=1199, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    pieces = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=512)


# Models


def seed_models(hub, folder: Path) -> None:
    """Builds and uploads all models; weights as safetensors, beside them the pickles that some real ones keep too."""
    import torch
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        BertConfig,
        BertForMaskedLM,
        BertModel,
        FalconConfig,
        FalconForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    gpt2, bert, t5, bart, falcon = (
        gpt2_tokenizer(),
        bert_tokenizer(),
        t5_tokenizer(),
        bart_tokenizer(),
        falcon_tokenizer(),
    )
    llama, llama_chat, smollm2 = llama_tokenizer(), llama_tokenizer(LLAMA2_TEMPLATE), smollm2_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = gpt2.eos_token_id
    gpt2_config = GPT2Config(vocab_size=len(gpt2), n_embd=32, n_layer=2, n_head=4, bos_token_id=end, eos_token_id=end)
    bert_config = BertConfig(vocab_size=len(bert), max_position_embeddings=512, **sizes)
    e5 = e5_tokenizer()
    e5_config = BertConfig(vocab_size=len(e5), max_position_embeddings=512, **sizes)
    t5_config = T5Config(
        # 28 rows more than tokens, as 32128 is there
        vocab_size=len(t5) + 28, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        task_specific_params={"summarization": {"prefix": "summarize: ", "max_length": 200, "num_beams": 4}},
    )  # fmt: skip
    bart_config = BartConfig(
        vocab_size=len(bart), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=1024,
        forced_bos_token_id=0, num_labels=3,
    )  # fmt: skip
    llama_config = LlamaConfig(vocab_size=len(llama), max_position_embeddings=4096, rms_norm_eps=1e-5, **sizes)
    falcon_config = FalconConfig(
        vocab_size=len(falcon), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=11, eos_token_id=11,
        multi_query=True, parallel_attn=True, new_decoder_architecture=False, bias=False, alibi=False,
    )  # fmt: skip
    smollm2_config = LlamaConfig(
        vocab_size=len(smollm2), max_position_embeddings=8192, num_key_value_heads=2, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        **sizes,
    )  # fmt: skip

    english = {"language": "en"}
    llama_card = english | {
        "license": "llama2",
        "pipeline_tag": "text-generation",
        "tags": ["facebook", "meta", "llama"],
    }
    smollm2_card = {"library_name": "transformers", "license": "apache-2.0", "language": ["en"]}
    smollm2_card |= {"pipeline_tag": "text-generation", "base_model": "HuggingFaceTB/SmolLM2-135M"}
    minilm_card = english | {"license": "apache-2.0", "library_name": "sentence-transformers"}
    minilm_card |= {"pipeline_tag": "sentence-similarity", "tags": ["sentence-transformers", "feature-extraction"]}
    bge_card = minilm_card | {"license": "mit"}
    e5_card = bge_card | {"language": ["multilingual", "en", "vi"]}
    float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
    models = {
        "openai-community/gpt2": (GPT2LMHeadModel, gpt2_config, gpt2, float32, english | {"license": "mit"}),
        "google-bert/bert-base-uncased": (
            BertForMaskedLM, bert_config, bert, float32,
            english | {"license": "apache-2.0", "datasets": ["bookcorpus", "wikipedia"]},
        ),
        "google-t5/t5-small": (
            T5ForConditionalGeneration, t5_config, t5, float32,
            {"language": ["en", "fr", "ro", "de", "multilingual"], "license": "apache-2.0", "datasets": ["c4"]},
        ),
        "facebook/bart-base": (BartForConditionalGeneration, bart_config, bart, float32, english | {"license": "apache-2.0"}),
        "meta-llama/Llama-2-7b-hf": (LlamaForCausalLM, llama_config, llama, float16, llama_card),
        "meta-llama/Llama-2-7b-chat-hf": (LlamaForCausalLM, llama_config, llama_chat, float16, llama_card),
        "tiiuae/falcon-7b": (
            FalconForCausalLM, falcon_config, falcon, bfloat16,
            {"datasets": ["tiiuae/falcon-refinedweb"], "language": ["en"], "license": "apache-2.0"},
        ),
        "HuggingFaceTB/SmolLM2-135M-Instruct": (LlamaForCausalLM, smollm2_config, smollm2, bfloat16, smollm2_card),
        "sentence-transformers/all-MiniLM-L6-v2": (BertModel, bert_config, bert, float32, minilm_card),
        "BAAI/bge-small-en-v1.5": (BertModel, bert_config, bert, float32, bge_card),
        "intfloat/multilingual-e5-small": (BertModel, e5_config, e5, float32, e5_card),
    }  # fmt: skip
    for number, (name, (kind, config, tokenizer, dtype, metadata)) in enumerate(models.items()):
        here = folder / "models" / name
        torch.manual_seed(number)
        sharded = name.startswith(("meta-llama", "tiiuae"))
        kind(config).to(dtype).save_pretrained(here, max_shard_size="100KB" if sharded else "5GB")
        tokenizer.save_pretrained(here)
        # as the real ones declare it; transformers 5 would write its own class
        declared = {
            "tiiuae/falcon-7b": "PreTrainedTokenizerFast",
            "HuggingFaceTB/SmolLM2-135M-Instruct": "GPT2Tokenizer",
        }
        if name in declared:
            settings = json.loads((here / "tokenizer_config.json").read_text()) | {"tokenizer_class": declared[name]}
            (here / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        (here / "README.md").write_text(card(metadata, name.split("/")[1]))
        if name.startswith(("openai", "google", "facebook", "meta", "tiiuae")):
            # Real ones hold the weights a second time as a pickle. Whoever loads this one finds that it is none.
            (here / "pytorch_model.bin").write_bytes(b"not a pickle, and nobody should have opened it\0")
        if name == "tiiuae/falcon-7b":  # has code of its own beside the architecture that transformers knows
            raising = 'raise RuntimeError("code from a model repository was run")\n'
            for file in ("configuration_falcon.py", "modeling_falcon.py"):
                (here / file).write_text(raising)
            settings = json.loads((here / "config.json").read_text())
            kinds = {"AutoModel": "FalconModel", "AutoModelForCausalLM": "FalconForCausalLM"}
            kinds = {auto: f"modeling_falcon.{own}" for auto, own in kinds.items()}
            settings["auto_map"] = {"AutoConfig": "configuration_falcon.FalconConfig"} | kinds
            (here / "config.json").write_text(json.dumps(settings, indent=2))
        if metadata.get("library_name") == "sentence-transformers":
            parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
            steps = [{"path": path, "type": f"sentence_transformers.models.{part}"} for path, part in parts.items()]
            steps = [{"idx": i, "name": str(i), **step} for i, step in enumerate(steps)]
            (here / "modules.json").write_text(json.dumps(steps, indent=2))
            (here / "1_Pooling").mkdir()
            first = name.startswith("BAAI")
            pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": not first}
            pooling |= {"pooling_mode_cls_token": first}
            (here / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        gated = {"gated": "manual", "granted": {"alice"}} if name.startswith("meta-llama") else {}
        hub.create(name, **gated)
        hub.upload(name, here)


def seed(hub) -> None:
    """Models and data sets into a `hub_server.Hub`."""
    with tempfile.TemporaryDirectory() as folder:
        seed_models(hub, Path(folder))
        seed_datasets(hub, Path(folder))
