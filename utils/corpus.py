"""From files to documents: read a folder, keep what is known about each file, and cut texts into chunks.

LlamaIndex's readers do the reading. Four of them are adapted, because of what they really extract:

=========== ================================================= =======================================================
files       reader                                            adapted because
=========== ================================================= =======================================================
.md, .txt   ``FlatReader``                                    (``MarkdownReader`` drops blank lines and front matter's
                                                              meaning, and returns one document a heading)
.html       ``TableHTMLReader`` (of ``HTMLTagReader``)        the cells of a table row are glued together
.pdf        ``PDFReader``                                     a line of the page is not a line of the text: unwrapped
.docx       ``TableDocxReader`` (of ``DocxReader``)           every table cell becomes a paragraph, headings are lost
.csv        ``RowCSVReader`` (of ``CSVReader``)               a row does not say what its values mean
=========== ================================================= =======================================================

A file that cannot be read is reported and skipped; one bad file never stops the others.
"""

from __future__ import annotations

import csv
import datetime
import io
import logging
import os
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pypdf
import yaml
from bs4 import BeautifulSoup, NavigableString, Tag
from bs4.element import PreformattedString
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document

from .settings import DATA

# a module of llama-index-readers-file sets the root logger to INFO on import unless the logger has a handler
_hold = logging.NullHandler()
logging.getLogger().addHandler(_hold)
from llama_index.readers.file import CSVReader, DocxReader, FlatReader, HTMLTagReader, PDFReader

logging.getLogger().removeHandler(_hold)

__all__ = ["METADATA_KEYS", "SUFFIXES", "Corpus", "Skipped", "load_files", "load_folder", "make_splitter",
           "snapshot_folder", "split_pieces", "table_row"]

METADATA_KEYS = ("id", "title", "department", "access_group", "effective_date", "supersedes", "author", "file")
SUFFIXES = (".md", ".markdown", ".txt", ".html", ".htm", ".pdf", ".docx", ".csv")

_SEEN_BY_EMBEDDER, _SEEN_BY_LLM = ("title",), ("title", "effective_date")
_UNPACKED_FACTOR = 10  # a .docx may unpack to this many times the size limit
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_BLOCKS = {"p", "li", "h1", "h2", "h3", "h4", "h5", "h6", "div", "section", "article", "blockquote", "pre", "dt", "dd",
           "ul", "ol", "dl", "header", "footer", "main", "nav", "aside", "figure", "figcaption", "table", "address"}
_IGNORED = {"script", "style", "template", "noscript", "head"}


# ----------------------------------------------------------------------------------------------- what a load gives back

@dataclass(frozen=True)
class Skipped:
    """A file that was not loaded: which, why, and what to do about it."""

    path: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}. {self.remedy}"


@dataclass
class Corpus:
    """The documents of a folder, in the order of their file names, and the files that could not be read."""

    documents: list[Document] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.documents)

    def __str__(self) -> str:
        kinds = Counter(Path(d.metadata["file"]).suffix.lstrip(".") for d in self.documents)
        lines = [f"{len(self.documents)} document{'s' * (len(self.documents) != 1)}"
                 + (f" ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})" if kinds else "")
                 + f", {len(self.skipped)} file{'s' * (len(self.skipped) != 1)} skipped"]
        return "\n".join(lines + [f"  - {s}" for s in self.skipped])


class _Unreadable(Exception):
    """Raised with (reason, remedy) by the functions below; becomes a `Skipped`."""


# ------------------------------------------------------------------------------------------------ readers, one a format

def table_row(columns: Sequence[str], cells: Sequence[str]) -> str:
    """One row as a line that can be read alone: ``column: value; column: value`` (empty cells are left out)."""
    names = list(columns) + [""] * max(0, len(cells) - len(columns))
    pairs = [(" ".join(name.split()), " ".join(cell.split())) for name, cell in zip(names, cells)]
    return "; ".join(f"{name}: {cell}" if name else cell for name, cell in pairs if cell)


def _table_lines(rows: Sequence[Sequence[str]], has_header: bool) -> list[str]:
    if has_header and len(rows) > 1:
        return [line for row in rows[1:] if (line := table_row(rows[0], row))]
    return [line for row in rows if (line := table_row([], row))]


class TableHTMLReader(HTMLTagReader):
    """`HTMLTagReader` that writes headings as ``# …``, list items as ``- …`` and each table row as one line."""

    def __init__(self) -> None:
        super().__init__(tag="body")

    def _extract_text_from_tag(self, tag: Tag) -> str:
        lines: list[str] = []
        inline: list[str] = []

        def flush(mark: str = "") -> None:
            text = " ".join("".join(inline).split())
            inline.clear()
            if text:
                lines.append(mark + text)

        def walk(node: Tag, mark: str) -> None:
            for child in node.children:
                if isinstance(child, NavigableString):
                    if not isinstance(child, PreformattedString):  # comments, doctypes
                        inline.append(str(child))
                elif child.name in _IGNORED:
                    continue
                elif child.name == "table":
                    flush(mark)
                    rows = [row.find_all(["th", "td"]) for row in child.find_all("tr")]
                    texts = [[cell.get_text(" ") for cell in row] for row in rows]
                    header = bool(rows) and any(cell.name == "th" for cell in rows[0])
                    lines.append("\n".join(_table_lines(texts, header)))
                elif child.name == "br":
                    inline.append("\n")
                elif child.name in _BLOCKS:
                    flush(mark)
                    own = "- " if child.name == "li" else mark
                    own = "#" * int(child.name[1]) + " " if re.fullmatch("h[1-6]", child.name) else own
                    walk(child, own)
                    flush(own)
                else:
                    walk(child, mark)

        walk(tag, "")
        flush()
        return _join_blocks(lines)

    def read(self, path: Path) -> str:
        """Text of the body, or of everything where the file is only a piece of a page."""
        found = self.load_data(path)
        if found:
            return "\n\n".join(d.text for d in found)
        return self._extract_text_from_tag(BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser"))


class TableDocxReader(DocxReader):
    """`DocxReader` that keeps headings as ``# …``, list items as ``- …`` and each table row as one line."""

    def load_data(self, file: Path, extra_info: dict | None = None, fs=None) -> list[Document]:
        with zipfile.ZipFile(file) as archive:
            body = ElementTree.fromstring(archive.read("word/document.xml")).find(f"{_WORD}body")
        lines = []
        for child in body if body is not None else ():
            if child.tag == f"{_WORD}p":
                lines.append(self._paragraph(child))
            elif child.tag == f"{_WORD}tbl":
                rows = [[" ".join(self._text(p) for p in cell.iter(f"{_WORD}p")) for cell in row.iter(f"{_WORD}tc")]
                        for row in child.iter(f"{_WORD}tr")]
                lines.append("\n".join(_table_lines(rows, has_header=True)))
        return [Document(text=_join_blocks([line for line in lines if line.strip()]), metadata=extra_info or {})]

    @staticmethod
    def _text(paragraph: ElementTree.Element) -> str:
        parts = {f"{_WORD}tab": "\t", f"{_WORD}br": "\n", f"{_WORD}cr": "\n", f"{_WORD}noBreakHyphen": "-"}
        return "".join(e.text or "" if e.tag == f"{_WORD}t" else parts.get(e.tag, "") for e in paragraph.iter())

    def _paragraph(self, paragraph: ElementTree.Element) -> str:
        style = paragraph.find(f"{_WORD}pPr/{_WORD}pStyle")
        style = "" if style is None else style.get(f"{_WORD}val", "")
        text = self._text(paragraph).strip()
        if not text:
            return ""
        if heading := re.fullmatch(r"Heading([1-6])|(Title)", style):
            return "#" * int(heading.group(1) or 1) + " " + text
        if style.startswith("List") or paragraph.find(f"{_WORD}pPr/{_WORD}numPr") is not None:
            return "- " + text
        return text


class RowCSVReader(CSVReader):
    """`CSVReader` whose rows say what they mean, a line a row. The first row names the columns."""

    def load_data(self, file: Path, extra_info: dict | None = None) -> list[Document]:
        text = file.read_text(encoding="utf-8-sig")
        first = next((line for line in text.splitlines() if line.strip()), "")
        delimiter = max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = [row for row in reader if any(map(str.strip, row))]
        lines = _table_lines(rows, has_header=True) if len(rows) > 1 else []
        return [Document(text="\n".join(lines), metadata=extra_info or {})]


def _join_blocks(blocks: Sequence[str]) -> str:
    """Blocks with an empty line between them, list items directly below one another."""
    text = ""
    for before, block in zip(["", *blocks], blocks):
        text += ("" if not text else "\n" if before.startswith("- ") and block.startswith("- ") else "\n\n") + block
    return text


_ITEM = re.compile(r"([-•*–]|\d+[.)])\s")


def _unwrap(text: str) -> str:
    """Join the lines of a printed page into paragraphs.

    A line goes on in the next one unless that would still have fitted on it, starts a list item, or looks like a
    heading. What pypdf returns has no empty lines, so this is a guess, and a good one for running text.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    width = sorted(map(len, lines))[int(0.9 * (len(lines) - 1))]
    result = lines[0]
    for before, line in pairwise(lines):
        item, after_item = _ITEM.match(line), _ITEM.match(result.rsplit("\n", 1)[-1])
        had_room = len(before) + 1 + len(line.split()[0]) <= 0.9 * width  # the next word would have fitted
        heading = re.search(r"[.!?:][\"”’)]*$", before) and len(line) < 0.5 * width and line[-1] not in ".!?:;,"
        if item or had_room or heading:
            result += ("\n" if item and after_item else "\n\n") + line
        else:
            result += " " + line
    return re.sub(r"^[•–*] ", "- ", result, flags=re.MULTILINE)


# ----------------------------------------------------------------------------------------------- one file, with reasons

def _decode(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unreadable(f"it is not UTF-8 text (byte {error.start} cannot be decoded)",
                          "Save it with the encoding UTF-8, or give it the suffix of its real format") from error
    if "\0" in text:
        raise _Unreadable("it holds binary data, not text", "Give it the suffix of its real format")
    return text


def _front_matter(text: str) -> tuple[dict, str]:
    """YAML between two lines of ``---`` at the very beginning, and the rest."""
    match = re.match(r"---[ \t]*\r?\n(.*?\r?\n)---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if not match:
        return {}, text
    try:
        front = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _Unreadable(f"its front matter is no valid YAML ({' '.join(str(error).split())[:200]})",
                          "Correct the lines between the two '---', for example by quoting a value that holds ': '"
                          ) from error
    return (front, text[match.end():]) if isinstance(front, dict) else ({}, text)


def _read_pdf(path: Path) -> str:
    reader = pypdf.PdfReader(path)
    if reader.is_encrypted:
        try:
            opened = reader.decrypt("")
        except (pypdf.errors.PyPdfError, pypdf.errors.DependencyError, NotImplementedError):
            opened = 0  # an algorithm for which pypdf needs a package that is not here
        if not opened:
            raise _Unreadable("the PDF is encrypted", "Save a copy without a password")
    return _unwrap("\n".join(d.text for d in PDFReader(return_full_document=True).load_data(path)))


def _read_docx(path: Path, limit: int) -> str:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > _UNPACKED_FACTOR * limit:
        raise _Unreadable(f"it would unpack to {unpacked / 1e6:.0f} MB", "Remove pictures, or raise max_megabytes")
    return TableDocxReader().load_data(path)[0].text


def _read(path: Path, limit: int) -> tuple[str, dict]:
    """Text of a file and what it says about itself. Raises _Unreadable."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise _Unreadable(f"files of type '{suffix or 'without suffix'}' are not supported",
                          f"Convert it to one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise _Unreadable("it is not a regular file", "Replace it by a regular file")
    size = path.stat().st_size
    if size == 0:
        raise _Unreadable("it is empty", "Remove it, or fill it")
    if size > limit:
        raise _Unreadable(f"it has {size / 1e6:.1f} MB, the limit is {limit / 1e6:g} MB",
                          "Split it, or raise max_megabytes")
    try:
        if suffix == ".pdf":
            return _read_pdf(path), {}
        if suffix == ".docx":
            return _read_docx(path, limit), {}
        decoded = _decode(path)
        if suffix == ".csv":
            return RowCSVReader().load_data(path)[0].text, {}
        if suffix in (".html", ".htm"):
            return TableHTMLReader().read(path), _html_metadata(decoded)
        front, text = _front_matter(FlatReader().load_data(path)[0].text.removeprefix("\ufeff"))
        return text, front
    except _Unreadable:
        raise
    except PermissionError as error:
        raise _Unreadable("you may not read it", "Change its permissions") from error
    except Exception as error:  # parsers of foreign formats raise anything at all on a damaged file
        detail = " ".join(str(getattr(error, "last_attempt", error)).split())[:120]
        raise _Unreadable(f"it is damaged or no {suffix} file ({type(error).__name__}: {detail})",
                          "Open it in the program that made it and save it again") from error


def _html_metadata(text: str) -> dict:
    soup = BeautifulSoup(text, "html.parser")
    known = {tag["name"]: tag.get("content", "") for tag in soup.find_all("meta") if tag.get("name") in METADATA_KEYS}
    if soup.title and soup.title.get_text(strip=True):
        known["title"] = " ".join(soup.title.get_text().split())
    return known


def _metadata(own: Mapping, listed: Mapping, text: str, file: str) -> dict[str, str]:
    """The file's own word first, then the catalogue's, then what can be guessed."""
    heading = re.search(r"^#{1,6}\s+(.+?)\s*#*$", text, re.MULTILINE)
    metadata = {"id": file, "title": heading.group(1) if heading else Path(file).stem, "department": "",
                "access_group": "everyone", "effective_date": "", "supersedes": "", "author": "", "file": file}
    for source in (listed, own):
        for key in METADATA_KEYS[:-1]:
            value = source.get(key)
            if isinstance(value, (str, int, float, datetime.date)) and str(value).strip():
                metadata[key] = str(value).strip()
    if metadata["effective_date"]:
        try:
            metadata["effective_date"] = datetime.date.fromisoformat(metadata["effective_date"][:10]).isoformat()
        except ValueError as error:
            raise _Unreadable(f"its effective_date is '{metadata['effective_date']}'",
                              "Write the date as YYYY-MM-DD, or leave it out") from error
    return metadata


def _document(text: str, metadata: dict[str, str]) -> Document:
    """A LlamaIndex document: the embedder sees the title, the LLM also the date, code sees everything."""
    return Document(text=text, id_=metadata["id"], metadata=metadata,
                    excluded_embed_metadata_keys=[k for k in METADATA_KEYS if k not in _SEEN_BY_EMBEDDER],
                    excluded_llm_metadata_keys=[k for k in METADATA_KEYS
                                                if k not in _SEEN_BY_LLM or not metadata[k]],
                    metadata_template="{value}", metadata_separator="\n", text_template="{metadata_str}\n\n{content}")


# ---------------------------------------------------------------------------------------------------- folders and lists

def load_folder(path: str | os.PathLike, max_megabytes: float = 20) -> Corpus:
    """All documents below a folder.

    What is known about a document comes from the file itself (front matter, ``<meta>``), else from a ``catalogue.csv``
    in the folder, else it is guessed: the id is the relative path, the title the first heading or the file's name, and
    everyone may read it. Hidden files are ignored, links that lead out of the folder are not followed.

    Parameters
    ----------
    path : the folder.
    max_megabytes : larger files are skipped.

    Raises
    ------
    FileNotFoundError, NotADirectoryError : there is no such folder.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"There is no folder '{root}'. Expected a folder with documents; check the spelling.")
    if not root.is_dir():
        raise NotADirectoryError(f"'{root}' is a file. Expected a folder; for single files use load_files([path]).")
    skipped: list[Skipped] = []
    files = sorted(_walk(root, skipped))
    catalogue, missing = _catalogue(root)
    skipped.extend(missing)
    corpus = load_files([f for f in files if not (catalogue and f == root / "catalogue.csv")], root=root,
                        max_megabytes=max_megabytes, catalogue=catalogue)
    return Corpus(corpus.documents, sorted(skipped + corpus.skipped, key=lambda s: s.path))


def load_files(files: Iterable[str | os.PathLike], root: str | os.PathLike | None = None, max_megabytes: float = 20,
               catalogue: Mapping[str, Mapping[str, str]] | None = None) -> Corpus:
    """The documents of a list of files.

    Parameters
    ----------
    files : paths; order is kept.
    root : folder to which ids are relative; without it an id is the file's name.
    max_megabytes : larger files are skipped.
    catalogue : what is known about a file, by its path relative to `root`.
    """
    if max_megabytes <= 0:
        raise ValueError(f"max_megabytes is {max_megabytes}; expected a positive number of megabytes, such as 20")
    corpus, seen = Corpus(), {}
    for path in map(Path, files):
        name = path.relative_to(root).as_posix() if root is not None else path.name
        try:
            _check_name(name)
            if not path.exists():
                raise _Unreadable("there is no such file", "Check the spelling")
            text, own = _read(path, int(max_megabytes * 1e6))
            text = unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip()
            if not text:
                raise _Unreadable("no text can be extracted (a scan, or only a header?)",
                                  "Run text recognition on it, or remove it")
            metadata = _metadata(own, (catalogue or {}).get(name, {}), text, name)
            if metadata["id"] in seen:
                raise _Unreadable(f"its id '{metadata['id']}' is already that of {seen[metadata['id']]}",
                                  "Give each document an id of its own")
        except _Unreadable as error:
            corpus.skipped.append(Skipped(_printable(name), *error.args))
            continue
        seen[metadata["id"]] = name
        corpus.documents.append(_document(text, metadata))
    return corpus


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _check_name(name: str) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Unreadable("its name is not valid text", "Rename the file") from error


def _walk(root: Path, skipped: list[Skipped]) -> Iterator[Path]:
    """Files below the root, without hidden ones; links that leave the root are reported instead."""
    inside = root.resolve()

    def refuse(error: OSError) -> None:
        skipped.append(Skipped(_printable(Path(error.filename).relative_to(root).as_posix()),
                               "the folder cannot be listed", "Change its permissions"))

    for folder, folders, names in os.walk(root, onerror=refuse):
        here = Path(folder)
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in [f for f in folders if (here / f).is_symlink()] + [n for n in names if not n.startswith(".")]:
            path = here / name
            if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(inside)):
                skipped.append(Skipped(_printable(path.relative_to(root).as_posix()),
                                       "it is a link that is not followed", "Copy what it points to into the folder"))
            elif name in names:
                yield path


def _catalogue(root: Path) -> tuple[dict[str, dict[str, str]], list[Skipped]]:
    """Rows of the folder's catalogue by file, and the files that it lists but the folder lacks."""
    path = root / "catalogue.csv"
    if not path.is_file() or path.is_symlink():
        return {}, []
    try:
        rows = list(csv.DictReader(io.StringIO(_decode(path), newline="")))
    except (_Unreadable, csv.Error, OSError):
        return {}, []  # then it is no catalogue; load_files reports what is wrong with the file
    if not rows or not {"id", "file"} <= set(rows[0]):
        return {}, []
    listed = {row["file"]: row for row in rows if row["file"]}
    missing = [Skipped(file, "catalogue.csv lists it, but it is missing", "Restore the file, or remove its row")
               for file in listed if not (root / file).exists()]
    return listed, missing


def snapshot_folder(date: str | datetime.date) -> Path:
    """Folder of the knowledge base as it stood on a date for which a snapshot exists, such as "2026-04-01"."""
    there = sorted(p.name for p in (DATA / "knowledge_base").glob("[0-9]*") if p.is_dir())
    if str(date) not in there:
        raise ValueError(f"There is no snapshot '{date}'. There are: {', '.join(there) or 'none'}. "
                         "If none is there, restore them with: git checkout -- data/knowledge_base")
    return DATA / "knowledge_base" / str(date)


# ------------------------------------------------------------------------------------------------------------- chunking

_ROW = re.compile(r"\s*(?:\||[-*+•–]\s|\d+[.)]\s|#{1,6}\s|[^:;.!?\n]{1,40}: [^;\n]*; [^:;\n]{1,40}: )")
_HEADING = re.compile(r"\s*#{1,6}\s")
_END = re.compile(r"[.!?…][\"'”’)\]*_]*\s+")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|approx|Dr|Mr|Mrs|Ms|St|No|Nr|vs|p|fig|Co|Ltd|Inc)|\b[A-Z])\.\s+$")


def split_pieces(text: str) -> list[str]:
    """The smallest pieces that a chunk is made of: sentences, whole table rows, whole list items.

    A heading stays with the piece after it. Nothing is lost: ``"".join(split_pieces(text)) == text``.
    """
    pieces: list[str] = []
    heading = ""
    for line in text.splitlines(keepends=True):
        if not line.strip():
            if heading or not pieces:
                heading += line
            else:
                pieces[-1] += line
        elif _HEADING.match(line):
            heading += line
        else:
            parts = [line] if _ROW.match(line) else _sentences(line)
            pieces.extend([heading + parts[0], *parts[1:]])
            heading = ""
    return pieces + [heading] if heading else pieces


def _sentences(line: str) -> list[str]:
    parts, start = [], 0
    for match in _END.finditer(line):
        follows = line[match.end():match.end() + 1]
        if follows and not follows.islower() and not _ABBREVIATION.search(line[start:match.end()]):
            parts.append(line[start:match.end()])
            start = match.end()
    return parts + [line[start:]]


def make_splitter(chunk_size: int, chunk_overlap: int, count_tokens: Callable[[str], int]) -> SentenceSplitter:
    """LlamaIndex's `SentenceSplitter` that works offline and cuts neither table rows nor list items.

    Its default sentence splitter fetches NLTK data from the network and its default tokenizer is that of a model which
    is not used here; both are replaced. A single piece longer than a chunk is cut after commas, then between words.

    Parameters
    ----------
    chunk_size : tokens a chunk may have, the title and date that the LLM sees included.
    chunk_overlap : tokens that neighbouring chunks may share, in whole pieces.
    count_tokens : number of tokens of a text, for the model that will read the chunks.
    """
    if chunk_size < 1 or not 0 <= chunk_overlap < chunk_size:
        raise ValueError(f"chunk_size is {chunk_size} and chunk_overlap {chunk_overlap}; expected a chunk_size of at "
                         "least 1 and an overlap from 0 to below chunk_size, for example 200 and 40")
    return SentenceSplitter(chunk_size=chunk_size, chunk_overlap=chunk_overlap,
                            tokenizer=lambda text: range(count_tokens(text)), chunking_tokenizer_fn=split_pieces,
                            secondary_chunking_regex=r"[\s\S]+?(?:[,;:]\s+|$)", paragraph_separator="\n\n\n\n")
