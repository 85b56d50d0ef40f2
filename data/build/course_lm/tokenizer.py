"""CourseLM's tokenizer: MiniLM's own word pieces, made lossless.

MiniLM's WordPiece vocabulary is uncased and forgets where spaces stood, so it cannot write "Gdańsk, €1,250".
This module keeps its pieces, and so the pre-trained embedding of each, and adds what is missing:

- *case*: a capital letter becomes the control character SHIFT followed by its small letter (" The" is read as SHIFT
  + " the"), so "The" and "the" share one embedding; SHIFT and ESCAPE themselves are escaped, so nothing is lost;
- *spaces*: a piece that starts a word carries its space ("Ġthe"), a continuation piece ("##ing") does not;
- *digits*: every digit is a token of its own;
- *anything else*: 256 byte tokens, so every UTF-8 text can be written.

The result is one `tokenizer.json` of the `tokenizers` library (Unigram over byte-level text); no code of ours runs
when it is loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

__all__ = ["SPECIAL_TOKENS", "CHAT_TEMPLATE", "ABSTENTION", "build_tokenizer", "byte_level"]

QUESTION, DOCUMENT, ANSWER, END, PAD = "<|question|>", "<|document|>", "<|answer|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, QUESTION, DOCUMENT, ANSWER, END)
#: which MiniLM token lends each special token its first embedding
SPECIAL_ORIGIN = {PAD: "[PAD]", QUESTION: "[CLS]", DOCUMENT: "[SEP]", ANSWER: "[MASK]", END: "[SEP]"}
ABSTENTION = "I don't know."
SHIFT, ESCAPE = "\x0e", "\x10"
# what is never merged: a digit; a lone capital; a word; a mark; white space
_UNITS = r" ?[0-9]|\x0e ?[a-z](?=\x0e|[^\p{L}]|$)| ?\p{L}+| ?[^\s\p{L}0-9]|\s"
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝĀČĆĐĒĘĞĪŁŃŇŌŘŚŞŠŪŮŹŻŽ"
ACCENTS = "àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿāăąčćďđēęěğīıłńňōőřśşšťūůűźżžßœþð"
SYMBOLS = ["€", "£", "¥", "–", "—", "’", "‘", "“", "”", "°", "·", "…", "×", "±", "²", "½", "µ", "→", "₹", "•", "§", "|", "\n", "\n\n"]

#: Messages to prompt. The last user message is the question; each document (a dict with `text` and, if wanted,
#: `title`) is read together with it, in a block of its own: "<|question|>…<|document|>[1] title\ntext".
CHAT_TEMPLATE = (
    "{%- set question = (messages | selectattr('role', 'equalto', 'user') | list | last).content -%}"
    "{%- if documents -%}{%- for document in documents -%}"
    "<|question|>{{ question }}<|document|>[{{ loop.index }}] "
    "{{ (document.title + '\\n' if document.title else '') + document.text }}"
    "{%- endfor -%}{%- else -%}<|question|>{{ question }}{%- endif -%}"
    "{%- if add_generation_prompt -%}<|answer|>{%- endif -%}"
)


def byte_level(text: str) -> str:
    """The text as the byte-level alphabet writes it (one printable character a byte)."""
    return "".join(_BYTE_TO_CHAR[b] for b in text.encode("utf-8"))


def _byte_to_char() -> dict[int, str]:
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in kept}
    extra = 0
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + extra)
            extra += 1
    return table


_BYTE_TO_CHAR = _byte_to_char()


def _normalizer() -> normalizers.Normalizer:
    steps = [normalizers.Replace(ESCAPE, ESCAPE + "\x11"), normalizers.Replace(SHIFT, ESCAPE + "\x12")]
    for capital in CAPITALS:
        small = capital.lower()
        steps.append(normalizers.Replace(" " + capital, SHIFT + " " + small))
        steps.append(normalizers.Replace(capital, SHIFT + small))
    return normalizers.Sequence(steps)


def _decoder() -> decoders.Decoder:
    steps = [decoders.ByteLevel()]
    for capital in CAPITALS:
        small = capital.lower()
        steps.append(decoders.Replace(SHIFT + " " + small, " " + capital))
        steps.append(decoders.Replace(SHIFT + small, capital))
    steps += [decoders.Replace(ESCAPE + "\x12", SHIFT), decoders.Replace(ESCAPE + "\x11", ESCAPE)]
    return decoders.Sequence(steps)


def _score(piece: str) -> float:
    # fewest pieces first; among equals the least even split, as WordPiece's longest-match-first would have it;
    # a word should not be cut into a bare space and a continuation
    return -12.0 if piece == "Ġ" else -10.0 + 1e-3 * min(len(piece), 24) ** 2


def build_tokenizer(minilm_tokenizer: Path, corpus_words: dict[str, int], max_unspaced: int = 3000):
    """Build the tokenizer and, for each of its tokens, the MiniLM tokens whose mean embedding it starts from.

    Parameters
    ----------
    minilm_tokenizer : path of MiniLM's `tokenizer.json`.
    corpus_words : lower-case words of the training texts with their counts; decides which words also get a token
        without a leading space (after a bracket, a capital or a line break).
    max_unspaced : how many such tokens at most.

    Returns
    -------
    (Tokenizer, list of int lists) : token i starts as the mean of the MiniLM rows in `origins[i]`.
    """
    vocab = json.loads(Path(minilm_tokenizer).read_text(encoding="utf-8"))["model"]["vocab"]
    pieces: dict[str, list[int]] = {}

    def add(piece: str, *origin: str) -> None:
        rows = [vocab[o] for o in origin if o in vocab]
        if piece not in pieces:
            pieces[piece] = rows or [vocab["[UNK]"]]

    for token in SPECIAL_TOKENS:
        add(token, SPECIAL_ORIGIN[token])
    for value in range(256):  # single bytes; ASCII ones start from MiniLM's own characters
        char = chr(value) if value < 128 else ""
        add(_BYTE_TO_CHAR[value], *( [f"##{char}", char] if char.isalnum() else [char]))
    add(byte_level("\n"), "[SEP]", ";")
    for char in (chr(v) for v in range(33, 127)):
        add(byte_level(" " + char), char.lower())
    for char in ACCENTS:
        plain = {"ß": "ss", "œ": "oe", "æ": "ae", "ø": "o", "đ": "d", "ł": "l", "ı": "i", "þ": "th", "ð": "d"}.get(char)
        base = plain or _strip_accent(char)
        add(byte_level(char), char, f"##{base}", base)
        add(byte_level(" " + char), char, base)
    for symbol in SYMBOLS:
        add(byte_level(symbol), symbol, "-" if symbol in "–—" else "'" if symbol in "’‘“”" else symbol)
        add(byte_level(" " + symbol), symbol, "-" if symbol in "–—" else "'" if symbol in "’‘“”" else symbol)
    for letter in "abcdefghijklmnopqrstuvwxyz":  # a lone capital, or one of NASA: a token of its own
        add(byte_level(SHIFT + letter), letter, f"##{letter}")
        add(byte_level(SHIFT + " " + letter), letter)
    plain_word = re.compile(r"^[a-z]+$")
    for token, index in sorted(vocab.items(), key=lambda item: item[1]):
        if token.startswith("##"):
            if plain_word.match(token[2:]):
                add(token[2:], token)
        elif plain_word.match(token):
            add(byte_level(" " + token), token)
    unspaced = 0
    for word, _ in sorted(corpus_words.items(), key=lambda item: (-item[1], item[0])):
        if unspaced >= max_unspaced:
            break
        if plain_word.match(word) and word in vocab and word not in pieces and len(word) > 1:
            add(word, word)
            unspaced += 1

    tokenizer = Tokenizer(models.Unigram([(p, _score(p)) for p in pieces], unk_id=0, byte_fallback=False))
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_UNITS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = _decoder()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer, list(pieces.values())


def _strip_accent(char: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFD", char)[0]


def start_embeddings(minilm_rows: np.ndarray, origins: list[list[int]]) -> np.ndarray:
    """First embedding of each token: the mean of its MiniLM rows. Shape (tokens, 384), float32."""
    return np.stack([minilm_rows[rows].mean(axis=0) for rows in origins]).astype(np.float32)
