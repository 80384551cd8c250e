#!/bin/sh
# Writes the files of this folder again; README.md says which program makes which.
# Needs pandoc, groff (with gropdf), qpdf, DejaVu fonts, and PYTHON with reportlab, img2pdf, pillow, EbookLib, srt and webvtt-py.
# WHISPER and WHISPERX are folders that hold whisper/utils.py and whisperx/utils.py, as their packages ship them.
set -eu
cd "$(dirname "$0")"
export SOURCE_DATE_EPOCH=1792540800 TZ=UTC

# --- books ---
pandoc book.md -t epub3 -o book.epub
pandoc book.md -t epub2 -o book-2.epub
pandoc book.md -s -t fb2 -o book.fb2
pandoc book.md -t docx -o book.docx
sed 's/encoding="UTF-8"/encoding="windows-1251"/' book.fb2 | iconv -c -f UTF-8 -t CP1251 > book-1251.fb2
rm -f book.fb2.zip && touch -d @$SOURCE_DATE_EPOCH book-1251.fb2 && zip -q -X book.fb2.zip book-1251.fb2 && rm book-1251.fb2

"$PYTHON" - <<'END'
from ebooklib import epub
book = epub.EpubBook()
book.set_identifier("fog"), book.set_title("Туман"), book.set_language("ru"), book.add_author("Анна Серова")
cover = epub.EpubImage(uid="cover", file_name="images/map.png", media_type="image/png", content=b"\x89PNG\r\n\x1a\n")
first = epub.EpubHtml(title="Первая", file_name="a b/первая.xhtml", lang="ru")
first.content = "<html><body><h1>Первая</h1><p>Туман&#160;лёг.<sup><a href='notes.xhtml#n1'>1</a></sup></p></body></html>"
notes = epub.EpubHtml(title="Notes", file_name="a b/notes.xhtml", lang="en")
notes.content = "<html><body><dl><dt>1</dt><dd id='n1'>Fog.</dd></dl><table><tr><td><p>One</p><p>cell</p></td></tr></table></body></html>"
for item in (cover, first, notes, epub.EpubNcx(), epub.EpubNav()):
    book.add_item(item)
book.toc, book.spine = [first, notes], ["nav", first, notes]
epub.write_epub("ebooklib.epub", book)
END

# --- PDF ---
"$PYTHON" - <<'END'
from PIL import Image, ImageDraw
from reportlab.lib.pagesizes import A5
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.platypus import PageBreak, Paragraph, SimpleDocTemplate
import img2pdf

pdfmetrics.registerFont(TTFont("DejaVu", "/usr/share/fonts/truetype/dejavu/DejaVuSerif.ttf"))
style = ParagraphStyle("p", fontName="DejaVu", fontSize=11, leading=14)
russian = """Утром над рекой стоял туман — густой, как молоко. Лодка шла медленно, и никто не гово-<br/>рил. «Не греби», — сказал
лоцман."""
english = "He said it twice, in English too: a well-<br/>known word."
pages = SimpleDocTemplate("book.pdf", pagesize=A5, title="Записки о тумане", author="Анна Серова", invariant=1)
pages.build([Paragraph(russian, style), PageBreak(), Paragraph(english, style)])
image = Image.new("1", (300, 200), 1)
ImageDraw.Draw(image).text((20, 20), "A scanned page", fill=0)
image.save("scan.png")
open("scan.pdf", "wb").write(img2pdf.convert("scan.png", nodate=True))
END
rm scan.png
groff -ms -Tpdf > groff.pdf <<'END'
.TL
Notes on fog
.AU
John Marsh
.PP
The fog over the river stood thick as milk. The boat went slowly, and nobody said a word about it.
.bp
Second page.
END
qpdf --static-id --encrypt secret owner 256 -- scan.pdf encrypted.pdf

# --- subtitles ---
PYTHONPATH="$WHISPER" "$PYTHON" - <<'END'
import importlib.util, os
def load(folder):
    spec = importlib.util.spec_from_file_location("writers", f"{folder}/utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
lines = [(0.0, 3.5, " Сегодня — туман."), (3.5, 7.25, " It is seen & felt,"), (7.25, 3725.0, " Вопрос: видно ли берег?")]
segments = [
    {"id": n, "seek": 0, "start": a, "end": b, "text": t, "tokens": [50364, 15], "temperature": 0.0, "avg_logprob": -0.21,
     "compression_ratio": 1.1, "no_speech_prob": 0.01} for n, (a, b, t) in enumerate(lines)]
options = {"max_line_width": None, "max_line_count": None, "highlight_words": False}
result = {"text": "".join(t for _, _, t in lines), "segments": segments, "language": "ru"}
whisper = load(os.environ["WHISPER"] + "/whisper")
for kind in ("json", "srt", "vtt"):
    whisper.get_writer(kind, ".")(result, "whisper.wav", options)
turns = [("SPEAKER_00", " Туман?"), ("SPEAKER_00", " Туман."), ("SPEAKER_01", " Ждём.")]
talk = [
    {"start": n * 2.0, "end": n * 2.0 + 1.5, "text": t, "speaker": s,
     "words": [{"word": t.strip(), "start": n * 2.0, "end": n * 2.0 + 1.5, "score": 0.9, "speaker": s}]}
    for n, (s, t) in enumerate(turns)]
whisperx = load(os.environ["WHISPERX"] + "/whisperx")
for kind in ("json", "srt", "vtt"):
    whisperx.get_writer(kind, ".")({"segments": talk, "word_segments": [], "language": "ru"}, "whisperx.wav", options)
END
"$PYTHON" - <<'END'
import datetime, srt, webvtt
second = lambda n: datetime.timedelta(seconds=n)
texts = ["- Лоцман: Не греби.\n- Анна: Почему?", "<i>Туман</i>,\n{\\an8}он <b>густой</b>", "Лоцман: Тише.", "Анна: 5 < 7 & 3"]
cues = [srt.Subtitle(index=n, start=second(n), end=second(n + 1), content=text) for n, text in enumerate(texts, start=1)]
open("srt.srt", "w", encoding="utf-8-sig", newline="\r\n").write(srt.compose(cues))
file = webvtt.WebVTT()
for start, end, text in [
    ("00:00:01.000", "00:00:02.000", "<v Анна Серова>Where is the <i>shore</i>?"),
    ("00:00:02.000", "00:00:03.500", "<v.loud Лоцман>Тише &amp; тише.</v> <v Анна Серова>Да.</v>"),
    ("01:00:00.000", "01:00:01.000", "<00:00:00.500><c.yellow>Fog</c> &lt;thick&gt;"),
]:
    caption = webvtt.Caption(start, end, text)
    caption.identifier = f"cue {start}"
    caption.comments = ["a note", ]
    file.captions.append(caption)
file.styles.append(webvtt.Style("::cue { color: white }")) if hasattr(webvtt, "Style") else None
file.save("webvtt.vtt")
END
