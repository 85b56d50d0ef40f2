"""Random values for the slots of a passage, so that no answer can be learnt by heart.

A value is replaced by another of its type: one that keeps its shape ("€1,310" → "€7,462"), one that stands in another
training passage, or, for names, one put together from syllables. The same old value gets the same new value in
passage, question and answer.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable

from .reading import SLOT, Passage

__all__ = ["ValuePool", "substitute", "plain"]

_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh sk st t th tr v w y z".split() + [""]
_NUCLEI = "a e i o u ai ea ei ia io oa ou ü ö é á y".split()
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "t", "x", "ck", "nd", "rn", "sk", "lm", "th", "rt"]
_NUMBER_WORDS = "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty".split()
_UNITS = ["minutes", "hours", "days", "weeks", "months", "years", "working days", "seconds"]
_MONTHS = ("January February March April May June July August September October November December").split()
_SHORT_MONTHS = [m[:3] for m in _MONTHS]
_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_ORG_ENDINGS = ["Ltd", "GmbH", "Group", "& Sons", "Systems", "Labs", "Foundation", "Works", "Partners", "AB", "Foods",
                "Logistics", "Institute", "Bank", "Energy", "Press", "Medical", "Cooperative"]
_NAMED = {"PERSON", "ORG", "PRODUCT", "PLACE", "TEAM", "ROLE", "THING"}


def syllable_word(rng: random.Random, low: int = 2, high: int = 3) -> str:
    """An invented word of two or three syllables, small letters."""
    word = "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS if i else [""])
                   for i in range(rng.randint(low, high)))
    return word if len(word) > 3 else word + rng.choice(["mer", "lin", "dor", "vik"])


def invented(kind: str, rng: random.Random) -> str:
    """An invented name of the given slot type."""
    word = syllable_word(rng).capitalize()
    if kind == "PERSON":
        surname = syllable_word(rng).capitalize()
        return f"{word} {surname}" + (f"-{syllable_word(rng).capitalize()}" if rng.random() < 0.1 else "")
    if kind == "ORG":
        return f"{word} {rng.choice(_ORG_ENDINGS)}" if rng.random() < 0.7 else word
    if kind == "PRODUCT":
        return f"{word} {rng.choice(['', rng.randint(2, 900), 'Pro', 'XL', 'Mini', 'Plus', 'S'])}".strip()
    return word


class ValuePool:
    """Values of every slot type seen in the training passages, and a way to draw others."""

    def __init__(self, passages: Iterable[Passage]):
        seen: dict[str, set[str]] = defaultdict(set)
        for passage in passages:
            for kind, value in SLOT.findall(passage.text):
                seen[kind].add(value)
        self.values = {kind: sorted(values) for kind, values in seen.items()}

    def draw(self, kind: str, value: str, rng: random.Random) -> str:
        """Another value of this type; numbers, dates and codes keep the shape of `value`."""
        if kind in _NAMED:
            pool = self.values.get(kind)
            if not pool or rng.random() < 0.35 and kind in {"PERSON", "ORG", "PRODUCT", "PLACE"}:
                return invented(kind, rng)
            return rng.choice(pool)
        if kind in {"DATE", "TIME", "DURATION", "NUM", "EMAIL"} and self.values.get(kind) and (
                rng.random() < 0.3 or not any(c.isdigit() for c in value)):
            if kind != "NUM" or not any(c.isdigit() for c in value):
                if kind == "NUM":
                    return rng.choice(_NUMBER_WORDS)
                if kind == "DURATION" and rng.random() < 0.5:
                    return f"{rng.choice(_NUMBER_WORDS)} {rng.choice(_UNITS)}"
                return rng.choice(self.values[kind])
        return mutate(value, kind, rng)


def mutate(value: str, kind: str, rng: random.Random) -> str:
    """Other digits, month and weekday names in the same shape."""
    if kind == "TIME":
        return re.sub(r"\d{1,2}([:.])\d\d", lambda m: f"{rng.randint(0, 23):02d}{m.group(1)}{rng.randrange(0, 60, 5):02d}",
                      value)
    if kind == "YEAR":
        return re.sub(r"\d{4}", lambda m: str(rng.randint(1600, 2030)), value)
    if kind == "DATE":
        value = re.sub("|".join(_MONTHS), lambda m: rng.choice(_MONTHS), value)
        value = re.sub(r"\b(" + "|".join(_SHORT_MONTHS) + r")\b", lambda m: rng.choice(_SHORT_MONTHS), value)
        value = re.sub("|".join(_WEEKDAYS), lambda m: rng.choice(_WEEKDAYS), value)
        value = re.sub(r"\b(19|20)\d\d\b", lambda m: str(rng.randint(1990, 2030)), value)
        value = re.sub(r"\b\d\d?(?=\s|$|st|nd|rd|th)", lambda m: str(rng.randint(1, 28)), value)
        return re.sub(r"(?<=-)\d\d", lambda m: f"{rng.randint(1, 12):02d}", value)
    digits = [i for i, c in enumerate(value) if c.isdigit()]
    out = list(value)
    for position, i in enumerate(digits):
        first = i == 0 or not value[i - 1].isdigit()
        followed = i + 1 < len(value) and value[i + 1].isdigit()
        out[i] = str(rng.randint(1 if first and (followed or value[i] != "0") else 0, 9))
    if kind == "CODE":
        out = [rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") if c.isupper() and c.isascii() else c for c in out]
        if not digits and value.islower():
            return syllable_word(rng) + rng.choice(["_", "-", ""]) + syllable_word(rng, 1, 2)
    if kind == "EMAIL":
        name, _, rest = value.partition("@")
        return f"{syllable_word(rng)}@{syllable_word(rng)}.example" if rng.random() < 0.5 else f"{syllable_word(rng)}@{rest}"
    return "".join(out)


def plain(text: str) -> str:
    """The text with its slots' own values."""
    return SLOT.sub(lambda m: m.group(2), text)


def substitute(texts: list[str], pool: ValuePool, rng: random.Random, change: float = 0.75) -> list[str]:
    """Replace slots consistently over all texts (passage first, then its questions and answers).

    change : share of the slots whose value is replaced; the others keep their own.
    """
    mapping: dict[str, str] = {}
    taken = {value for text in texts for _, value in SLOT.findall(text)}
    for text in texts:
        for match in SLOT.finditer(text):
            if match.group(0) in mapping:
                continue
            kind, value = match.groups()
            new = value
            if rng.random() < change:
                for _ in range(8):
                    new = pool.draw(kind, value, rng)
                    if new not in taken:
                        break
                else:
                    new = value
            taken.add(new)
            mapping[match.group(0)] = new
    return [SLOT.sub(lambda m: mapping[m.group(0)], text) for text in texts]
