"""Small files of each format, made here."""

import io
import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime

import docx
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject


def pdf(pages: Sequence[Sequence[str]], *, title: str = "", password: str | None = None, outline: Sequence[tuple[int, str]] = ()) -> bytes:
    """A PDF of *pages*, each some lines in Helvetica; *outline* are numbers of pages, from 0, with their titles."""
    writer = PdfWriter()
    names = {NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1")}
    font = DictionaryObject(
        {**names, NameObject("/BaseFont"): NameObject("/Helvetica"), NameObject("/Encoding"): NameObject("/WinAnsiEncoding")}
    )
    for lines in pages:
        page = writer.add_blank_page(612, 792)
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})})
        said = b"".join(b"(" + line.replace("(", r"\(").replace(")", r"\)").encode("cp1252") + b") Tj T*\n" for line in lines)
        stream = DecodedStreamObject()
        stream.set_data(b"BT /F1 11 Tf 14 TL 50 740 Td\n" + said + b"ET")
        page[NameObject("/Contents")] = writer._add_object(stream)
    for number, name in outline:
        writer.add_outline_item(title=name, page_number=number)
    if title:
        writer.add_metadata({"/Title": title, "/ModDate": "D:20240203040506Z"})
    if password is not None:
        writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def word(*, title: str = "") -> bytes:
    """A DOCX with headings, a list and a table."""
    document = docx.Document()
    document.core_properties.title = title
    document.core_properties.modified = datetime(2024, 5, 6, tzinfo=UTC)
    document.add_heading("La capibara", 1)
    document.add_paragraph("El roedor más grande del mundo vive en América del Sur.")
    document.add_heading("Comida", 2)
    document.add_paragraph("hierba", style="List Bullet")
    document.add_paragraph("corteza", style="List Bullet")
    table = document.add_table(rows=2, cols=2)
    for row, cells in zip(table.rows, (("Año", "Peso"), ("2023", "50 kg")), strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def bomb(size: int) -> bytes:
    """A DOCX whose document is *size* zeros when it is unpacked."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("word/document.xml", "w", force_zip64=True) as part:
        piece = b"0" * (1 << 20)
        for _ in range(size >> 20):
            part.write(piece)
    return out.getvalue()
