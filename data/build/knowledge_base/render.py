"""Write a document in its format: Markdown, HTML, PDF, Word or CSV, byte for byte the same in every run."""

from __future__ import annotations

import datetime
import html
import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import docx
import fpdf
import matplotlib
import yaml

from .sources import Document

__all__ = ["plain", "render"]

_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_MADE = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)  # no clock time may enter a file
_ZIP_DATE = (2026, 1, 1, 0, 0, 0)


def render(document: Document) -> bytes:
    """The document as the bytes of a file in its format."""
    return {"md": _markdown, "html": _html, "pdf": _pdf, "docx": _docx, "csv": _csv}[document.format](document)


def plain(text: str) -> str:
    """Text without Markdown's marks for bold, italics, code and links."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*])[*_](?=\S)(.+?)(?<=\S)[*_](?![\w*])", r"\1", text)
    return text.replace("`", "")


# --------------------------------------------------------------------------------------------------------- text formats

def _front(document: Document) -> dict:
    front = {"id": document.id, "title": document.title, "department": document.department,
             "access_group": document.access_group, "effective_date": document.effective_date,
             "supersedes": document.supersedes, "author": document.author}
    return {key: value for key, value in front.items() if value}


def _markdown(document: Document) -> bytes:
    front = yaml.safe_dump(_front(document), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{front}---\n\n{document.body}".encode()


def _html(document: Document) -> bytes:
    meta = "\n".join(f'<meta name="{key}" content="{html.escape(str(value))}">'
                     for key, value in _front(document).items())
    head = f'<head>\n<meta charset="utf-8">\n<title>{html.escape(document.title, quote=False)}</title>\n{meta}\n</head>'
    page, count = re.subn(r"<head>.*?</head>", lambda _: head, document.body, count=1, flags=re.DOTALL)
    if not count:
        raise ValueError(f"{document.file}: the page has no <head>…</head>")
    return (page if page.startswith("<!DOCTYPE") else "<!DOCTYPE html>\n" + page).encode()


def _csv(document: Document) -> bytes:
    return document.body.encode()


# ------------------------------------------------------------------------------------------ Markdown into simple blocks

@dataclass
class _Block:
    kind: str  # heading, bullet, text, table
    text: str = ""
    level: int = 0
    rows: list[list[str]] = field(default_factory=list)


def _blocks(body: str) -> Iterator[_Block]:
    table: list[list[str]] = []
    for line in [*body.splitlines(), ""]:
        if line.startswith("|"):
            cells = [plain(cell.strip()) for cell in line.strip().strip("|").split("|")]
            if not all(re.fullmatch(":?-+:?", cell) for cell in cells):
                table.append(cells)
            continue
        if table:
            yield _Block("table", rows=table)
            table = []
        if match := re.match(r"(#+)\s+(.*)", line):
            yield _Block("heading", plain(match.group(2)), len(match.group(1)))
        elif match := re.match(r"\s*[-*]\s+(.*)", line):
            yield _Block("bullet", plain(match.group(1)))
        elif line.strip():
            yield _Block("text", plain(line.strip().removeprefix("> ")))


# --------------------------------------------------------------------------------------------------------- PDF and Word

def _pdf(document: Document) -> bytes:
    pdf = fpdf.FPDF(format="A4")
    pdf.set_creation_date(_MADE)
    pdf.set_producer("Brindlemark")
    pdf.set_title(document.title)
    pdf.set_author(document.author)
    pdf.set_lang("en-GB")
    pdf.add_font("DejaVu", "", _FONTS / "DejaVuSans.ttf")
    pdf.add_font("DejaVu", "B", _FONTS / "DejaVuSans-Bold.ttf")
    pdf.set_margin(22)
    pdf.set_auto_page_break(True, margin=20)
    pdf.add_page()
    for block in _blocks(document.body):
        if block.kind == "heading":
            pdf.set_font("DejaVu", "B", {1: 15, 2: 12}.get(block.level, 10.5))
            pdf.ln(2)
            pdf.multi_cell(0, 7, block.text, align="L", new_x="LMARGIN", new_y="NEXT")
        elif block.kind == "table":
            pdf.set_font("DejaVu", "", 9)
            with pdf.table(text_align="LEFT", line_height=5, padding=1, col_widths=_widths(block.rows)) as table:
                for row in block.rows:
                    table.row(row)
        else:
            pdf.set_font("DejaVu", "", 10)
            text = f"• {block.text}" if block.kind == "bullet" else block.text
            pdf.multi_cell(0, 5.2, text, align="L", new_x="LMARGIN", new_y="NEXT")
        pdf.ln(0.5 if block.kind == "bullet" else 2)
    return bytes(pdf.output())


def _widths(rows: list[list[str]]) -> list[int]:
    """Relative widths of the columns: as wide as what stands in them, within bounds."""
    return [max(8, min(40, max(len(row[i]) for row in rows if i < len(row)))) for i in range(len(rows[0]))]


def _docx(document: Document) -> bytes:
    file = docx.Document()
    properties = file.core_properties
    properties.title, properties.author, properties.last_modified_by = document.title, document.author, document.author
    properties.created = properties.modified = _MADE.replace(tzinfo=None)
    properties.comments, properties.language = "", "en-GB"
    for block in _blocks(document.body):
        if block.kind == "heading":
            file.add_heading(block.text, min(block.level, 4))
        elif block.kind == "bullet":
            file.add_paragraph(block.text, style="List Bullet")
        elif block.kind == "table":
            table = file.add_table(rows=0, cols=len(block.rows[0]), style="Table Grid")
            for row in block.rows:
                for cell, text in zip(table.add_row().cells, row):
                    cell.text = text
        else:
            file.add_paragraph(block.text)
    buffer = io.BytesIO()
    file.save(buffer)
    return _repacked(buffer.getvalue())


def _repacked(archive: bytes) -> bytes:
    """The same zip archive with fixed dates."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            entry = zipfile.ZipInfo(info.filename, _ZIP_DATE)
            entry.compress_type, entry.external_attr, entry.create_system = zipfile.ZIP_DEFLATED, 0o600 << 16, 3
            new.writestr(entry, old.read(info.filename), compresslevel=9)
    return buffer.getvalue()
