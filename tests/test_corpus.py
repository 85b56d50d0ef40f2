"""Reading files of every kind, the bad ones included, and cutting texts into chunks."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import zipfile
from itertools import pairwise

import pypdf
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from llama_index.core.schema import MetadataMode

from utils.corpus import (
    METADATA_KEYS,
    Corpus,
    load_files,
    load_folder,
    make_splitter,
    snapshot_folder,
    split_pieces,
    table_row,
)
from utils.settings import ROOT


def count_words(text: str) -> int:
    return len(text.split())


def only(corpus: Corpus):
    assert corpus.skipped == [] and len(corpus.documents) == 1, str(corpus)
    return corpus.documents[0]


def reason(corpus: Corpus) -> str:
    """Why the only file was skipped; the remedy must not be empty."""
    assert corpus.documents == [] and len(corpus.skipped) == 1, str(corpus)
    assert corpus.skipped[0].remedy
    return corpus.skipped[0].reason


def write_docx(path, body: str) -> None:
    name = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml",
                         f'<w:document xmlns:w="{name}"><w:body>{body}</w:body></w:document>')


def paragraph(text: str, style: str = "") -> str:
    mark = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{mark}<w:r><w:t>{text}</w:t></w:r></w:p>"


def write_pdf(path, password: str | None = None, lines: tuple[str, ...] = ()) -> None:
    """A small PDF, written by hand."""
    text = " ".join(f"({line}) Tj T*" for line in lines)
    stream = f"BT /F1 12 Tf 14 TL 50 700 Td {text} ET".encode()
    resources = b"<< /Font << /F1 5 0 R >> >>"
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
               b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R /Resources %b >>" % resources,
               b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
               b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, start)
    path.write_bytes(out)
    if password is not None:
        writer = pypdf.PdfWriter(clone_from=path)
        writer.encrypt(password, algorithm="RC4-128")
        writer.write(path)


# -------------------------------------------------------------------------------------------------------------- formats

def test_markdown_with_front_matter(tmp_path):
    (tmp_path / "a.md").write_text(
        "---\nid: x-1\ntitle: 'Leave: rules'\naccess_group: people\neffective_date: 2026-01-02\n"
        "supersedes: x-0\nauthor: Zoë\n---\n\n# Leave\n\n26 days.\n", encoding="utf-8")
    document = only(load_folder(tmp_path))
    assert document.id_ == "x-1" and document.text == "# Leave\n\n26 days."
    assert document.metadata == {"id": "x-1", "title": "Leave: rules", "department": "", "access_group": "people",
                                 "effective_date": "2026-01-02", "supersedes": "x-0", "author": "Zoë", "file": "a.md"}


def test_a_learners_folder_without_metadata(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.md").write_text("Some words.\n\n## My notes\n\nmore", encoding="utf-8")
    (tmp_path / "plain.txt").write_text("hello", encoding="utf-8")
    corpus = load_folder(tmp_path)
    assert [(d.id_, d.metadata["title"], d.metadata["access_group"]) for d in corpus.documents] == [
        ("plain.txt", "plain", "everyone"), ("sub/notes.md", "My notes", "everyone")]
    assert all(set(d.metadata) == set(METADATA_KEYS) for d in corpus.documents)


def test_a_rule_at_the_top_is_no_front_matter(tmp_path):
    (tmp_path / "a.md").write_text("---\njust a line\n---\ntext", encoding="utf-8")
    assert "just a line" in only(load_folder(tmp_path)).text


def test_html(tmp_path):
    (tmp_path / "a.html").write_text(
        "<html><head><title> Prices &amp; terms </title><meta name='id' content='p1'><meta name='access_group' "
        "content='sales'><style>p {}</style></head><body><h1>Prices</h1><!-- secret --><p>All in <b>euro</b>,<br>net."
        "</p><ul><li>one</li><li>two</li></ul><table><tr><th>Robot</th><th>Price</th></tr><tr><td>Plover</td>"
        "<td>€5</td></tr></table><script>x()</script><table><tr><td>a</td><td>b</td></tr></table></body></html>",
        encoding="utf-8")
    document = only(load_folder(tmp_path))
    assert document.metadata["title"] == "Prices & terms" and document.metadata["access_group"] == "sales"
    assert document.text == "# Prices\n\nAll in euro, net.\n\n- one\n- two\n\nRobot: Plover; Price: €5\n\na; b"


def test_html_without_body(tmp_path):
    (tmp_path / "a.htm").write_text("<h2>Title</h2><p>text", encoding="utf-8")
    document = only(load_folder(tmp_path))
    assert document.text == "## Title\n\ntext" and document.metadata["title"] == "Title"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_rows_say_what_they_mean(tmp_path, delimiter):
    rows = [["site", "benefit", "note"], ["Ghent", "meal voucher", ""], ["Leeds", '"a ""b"""', "x"]]
    (tmp_path / "t.csv").write_text("\n".join(delimiter.join(row) for row in rows), encoding="utf-8-sig")
    assert only(load_folder(tmp_path)).text == ("site: Ghent; benefit: meal voucher\n"
                                                'site: Leeds; benefit: a "b"; note: x')


def test_table_row_with_more_cells_than_columns():
    assert table_row(["a"], ["1", "2"]) == "a: 1; 2"


def test_docx(tmp_path):
    cells = "".join("<w:tr>" + "".join(f"<w:tc>{paragraph(c)}</w:tc>" for c in row) + "</w:tr>"
                    for row in (("Who", "By"), ("Zoë", "1 May")))
    write_docx(tmp_path / "a.docx",
               paragraph("Report", "Heading1") + paragraph("It fell.") + paragraph("one", "ListBullet")
               + paragraph("two", "ListBullet") + f"<w:tbl>{cells}</w:tbl>")
    document = only(load_folder(tmp_path))
    assert document.text == "# Report\n\nIt fell.\n\n- one\n- two\n\nWho: Zoë; By: 1 May"
    assert document.metadata["title"] == "Report"


def test_pdf_lines_become_paragraphs(tmp_path):
    write_pdf(tmp_path / "a.pdf", lines=("Rules", "This line is as long as the page is wide here,",
                                         "and it goes on until it ends with a full stop,", "here.", "- item one",
                                         "- item two"))
    assert only(load_folder(tmp_path)).text == (
        "Rules\n\n"
        "This line is as long as the page is wide here, and it goes on until it ends with a full stop, here.\n\n"
        "- item one\n- item two")


# ------------------------------------------------------------------------------------------------------------ bad files

def test_one_bad_file_does_not_stop_the_others(tmp_path):
    (tmp_path / "good.md").write_text("fine", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("Zoë".encode("latin-1"))
    (tmp_path / "empty.md").write_bytes(b"")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    corpus = load_folder(tmp_path)
    assert [d.id_ for d in corpus.documents] == ["good.md"]
    assert [s.path for s in corpus.skipped] == ["empty.md", "latin.txt", "picture.png"]
    summary = str(corpus)
    assert summary.startswith("1 document (1 md), 3 files skipped")
    assert "latin.txt: it is not UTF-8 text (byte 2 cannot be decoded). Save it with the encoding UTF-8" in summary


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("empty.md", b"", "empty"),
    ("blank.txt", b" \n\n ", "no text"),
    ("header.csv", b"a,b,c\n", "no text"),
    ("latin.html", "<p>caf\xe9</p>".encode("latin-1"), "not UTF-8"),
    ("sixteen.txt", "hello".encode("utf-16"), "not UTF-8"),
    ("binary.txt", b"ab\0cd", "binary"),
    ("front.md", b"---\ntitle: a: b: c\n---\ntext", "YAML"),
    ("date.md", b"---\neffective_date: soon\n---\ntext", "effective_date is 'soon'"),
    ("nodate.md", b"---\neffective_date: 2026-13-45\n---\ntext", "YAML"),
    ("evil.md", b"---\ntitle: !!python/object/apply:os.system ['true']\n---\ntext", "YAML"),
    ("damaged.pdf", b"%PDF-1.4\nnonsense", "damaged"),
    ("no.pdf", b"just text", "damaged"),
    ("damaged.docx", b"PK\x03\x04nonsense", "damaged"),
    ("old.doc", b"\xd0\xcf\x11\xe0", "type '.doc'"),
    ("README", b"text", "without suffix"),
])
def test_bad_content(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in reason(load_folder(tmp_path))


def test_docx_without_a_document(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.writestr("other.xml", "<a/>")
    assert "damaged" in reason(load_folder(tmp_path))


def test_docx_that_unpacks_to_too_much(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"0" * 3_000_000)
    assert "unpack to 3 MB" in reason(load_folder(tmp_path, max_megabytes=0.1))


def test_encrypted_pdf(tmp_path):
    write_pdf(tmp_path / "a.pdf", password="secret", lines=("hidden",))
    assert "encrypted" in reason(load_folder(tmp_path))


def test_pdf_that_opens_without_a_password_is_read(tmp_path):
    write_pdf(tmp_path / "a.pdf", password="", lines=("open to all",))
    assert only(load_folder(tmp_path)).text == "open to all"


def test_pdf_without_text(tmp_path):
    write_pdf(tmp_path / "a.pdf")
    assert "no text" in reason(load_folder(tmp_path))


def test_oversized_file(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 2000, encoding="utf-8")
    assert "limit is 0.001 MB" in reason(load_folder(tmp_path, max_megabytes=0.001))
    assert len(load_folder(tmp_path)) == 1


def test_limit_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="max_megabytes is 0"):
        load_folder(tmp_path, max_megabytes=0)


def test_two_files_with_one_id(tmp_path):
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("---\nid: same\n---\ntext", encoding="utf-8")
    corpus = load_folder(tmp_path)
    assert [d.metadata["file"] for d in corpus.documents] == ["a.md"]
    assert "already that of a.md" in corpus.skipped[0].reason


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid") or os.geteuid() == 0,
                    reason="root may read everything")
def test_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.md").write_text("x", encoding="utf-8")
    (tmp_path / "a.md").chmod(0)
    assert "may not read" in reason(load_folder(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    assert "regular file" in reason(load_folder(tmp_path))


# ---------------------------------------------------------------------------------------------------- folders and lists

def test_hidden_files_are_ignored(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.md").write_text("x", encoding="utf-8")
    (tmp_path / ".hidden.md").write_text("x", encoding="utf-8")
    corpus = load_folder(tmp_path)
    assert corpus.documents == [] and corpus.skipped == []


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret.md").write_text("secret", encoding="utf-8")
    (inside / "a.md").write_text("text", encoding="utf-8")
    try:
        (inside / "file.md").symlink_to(outside / "secret.md")
        (inside / "folder").symlink_to(outside, target_is_directory=True)
        (inside / "loop").symlink_to(inside, target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    corpus = load_folder(inside)
    assert [d.id_ for d in corpus.documents] == ["a.md"]
    assert [s.path for s in corpus.skipped] == ["file.md", "folder", "loop"]


def test_catalogue_fills_in_what_the_file_does_not_say(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "b.md").write_text("---\ntitle: own\n---\ntext", encoding="utf-8")
    (tmp_path / "catalogue.csv").write_text("id,file,title,access_group,effective_date\nx1,a.txt,T,people,2026-02-03\n"
                                            "x2,b.md,other,sales,\nx3,gone.md,G,,\n", encoding="utf-8")
    corpus = load_folder(tmp_path)
    assert [(d.id_, d.metadata["title"], d.metadata["access_group"], d.metadata["effective_date"])
            for d in corpus.documents] == [("x1", "T", "people", "2026-02-03"), ("x2", "own", "sales", "")]
    assert [(s.path, "missing" in s.reason) for s in corpus.skipped] == [("gone.md", True)]


def test_a_csv_that_is_called_catalogue_but_is_none_is_a_document(tmp_path):
    (tmp_path / "catalogue.csv").write_text("plant,price\nrose,3\n", encoding="utf-8")
    assert only(load_folder(tmp_path)).text == "plant: rose; price: 3"


def test_list_of_files(tmp_path):
    (tmp_path / "b.md").write_text("b", encoding="utf-8")
    (tmp_path / "a.md").write_text("a", encoding="utf-8")
    corpus = load_files([tmp_path / "b.md", str(tmp_path / "a.md"), tmp_path / "none.md"])
    assert [d.id_ for d in corpus.documents] == ["b.md", "a.md"]
    assert corpus.skipped[0].reason == "there is no such file"


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_folder(tmp_path / "none")
    (tmp_path / "file.md").write_text("x", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match="load_files"):
        load_folder(tmp_path / "file.md")


def test_snapshot_folder():
    assert snapshot_folder("2026-04-01") == snapshot_folder(datetime.date(2026, 4, 1))
    with pytest.raises(ValueError, match="2026-04-01, 2026-10-01"):
        snapshot_folder("2025-01-01")
    with pytest.raises(ValueError, match="no snapshot"):
        snapshot_folder("../questions")


def test_what_the_embedder_and_the_llm_see(tmp_path):
    (tmp_path / "a.md").write_text("---\ntitle: Leave\naccess_group: people\neffective_date: 2026-01-02\n---\n26 days",
                                   encoding="utf-8")
    document = only(load_folder(tmp_path))
    assert document.get_content(MetadataMode.EMBED) == "Leave\n\n26 days"
    assert document.get_content(MetadataMode.LLM) == "Leave\n2026-01-02\n\n26 days"
    node = make_splitter(100, 0, count_words).get_nodes_from_documents([document])[0]
    assert node.get_content(MetadataMode.EMBED) == "Leave\n\n26 days"
    assert node.metadata["access_group"] == "people" and node.ref_doc_id == document.id_


def test_importing_leaves_logging_alone():
    """A reader of LlamaIndex sets the root logger to INFO on import."""
    code = "import logging, utils.corpus; print(logging.getLogger().level, logging.getLogger().handlers)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{30} []"


# ------------------------------------------------------------------------------------------------------------- chunking

def test_pieces():
    text = ("# A\n\nHello Mr. Smith. It weighs 3.5 kg, e.g. wet.\n\n- one. two\n- three\n\n"
            "| a. B | c |\n\nx: 1. Y; z: 2\n## End\n")
    assert split_pieces(text) == ["# A\n\nHello Mr. Smith. ", "It weighs 3.5 kg, e.g. wet.\n\n", "- one. two\n",
                                  "- three\n\n", "| a. B | c |\n\n", "x: 1. Y; z: 2\n", "## End\n"]


@given(st.text(alphabet=st.sampled_from("aB.!?#|-:; \n\"'1é"), max_size=200))
@hypothesis_settings(max_examples=300, deadline=None)
def test_pieces_lose_nothing(text):
    assert "".join(split_pieces(text)) == text


def test_chunks_keep_rows_and_items_whole_and_the_limit(tmp_path):
    rows = [f"| row {i} | value {i}. Also more | x |" for i in range(40)]
    items = [f"- item {i}. It has two sentences" for i in range(40)]
    (tmp_path / "a.md").write_text("# Table\n\n" + "\n".join(rows) + "\n\n" + "\n".join(items), encoding="utf-8")
    nodes = make_splitter(60, 0, count_words).get_nodes_from_documents(load_folder(tmp_path).documents)
    lines = [line for node in nodes for line in node.text.splitlines() if line and not line.startswith("#")]
    assert lines == rows + items
    assert all(count_words(node.get_content(MetadataMode.LLM)) <= 60 for node in nodes)


def test_chunks_overlap_by_whole_pieces(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"Sentence number {i} ends here." for i in range(60)), encoding="utf-8")
    nodes = make_splitter(70, 15, count_words).get_nodes_from_documents(load_folder(tmp_path).documents)
    for before, after in pairwise(nodes):
        first = after.text.split(". ")[0]
        assert first.startswith("Sentence") and first in before.text


def test_a_piece_longer_than_a_chunk_is_cut(tmp_path):
    (tmp_path / "a.txt").write_text("word, " * 500, encoding="utf-8")
    nodes = make_splitter(80, 0, count_words).get_nodes_from_documents(load_folder(tmp_path).documents)
    assert sum(count_words(node.text) for node in nodes) == 500


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (10, 10), (10, -1)])
def test_splitter_refuses_nonsense(size, overlap):
    with pytest.raises(ValueError, match="chunk_size is"):
        make_splitter(size, overlap, count_words)
