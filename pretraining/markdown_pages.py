"""HTML pages of documentation to Markdown, with the standard library alone."""

import re
from html.parser import HTMLParser

_SKIPPED = {"script", "style", "nav", "footer", "table", "svg", "form", "head", "header", "aside"}
_VOID = {"br", "hr", "img", "input", "link", "meta", "wbr", "col"}
_BLOCKS = {"p", "div", "section", "article", "dl", "dt", "dd", "ul", "ol", "blockquote", "main"}
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\xa0": " "})


def html_to_markdown(page: str) -> str:
    """The main part of a page that Sphinx or MkDocs wrote, as Markdown; empty if it has none.

    Headings, paragraphs, lists, code blocks, inline code, emphasis and links to other sites are kept; tables,
    navigation and what stands outside the main part are left out. Typographic quotes and dashes become ASCII.
    """
    parser = _Page()
    parser.feed(page)
    parser.close()
    text = "".join(parser.pieces).translate(_PLAIN)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._open: list[tuple[str, str, str]] = []  # tag, class, what ends it in Markdown
        self._main = 0  # depth in the main part
        self._skipped = 0
        self._code = 0
        self._lists: list[str] = []
        self._language = ""
        self._at_mark = False  # just after a mark that no blank may follow

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Markdown of an opening tag."""
        if tag in _VOID:
            if tag == "br" and self._visible():
                self.pieces.append("\n")
            return
        attributes = {name: value or "" for name, value in attrs}
        classes = attributes.get("class", "").split()
        is_main = tag in ("section", "article", "main") or attributes.get("role") == "main"
        is_main = is_main or "section" in classes
        is_skipped = tag in _SKIPPED or "headerlink" in classes or "viewcode-link" in classes
        is_skipped = is_skipped or attributes.get("role") == "navigation" or "toctree-wrapper" in classes
        self._main += is_main
        self._skipped += is_skipped
        end = ""
        if self._visible():
            end = self._begin(tag, classes, attributes)
        kind = ("main " if is_main else "") + ("skipped" if is_skipped else "")
        self._open.append((tag, kind, end))

    def _begin(self, tag: str, classes: list[str], attributes: dict[str, str]) -> str:
        if tag == "div":
            for name in classes:
                if name.startswith("highlight-"):
                    language = name.removeprefix("highlight-")
                    known = {"default": "python", "python3": "python", "pycon": "python", "ipython": "python"}
                    self._language = known.get(language, "" if language in ("none", "text") else language)
        if tag == "pre":
            self._paragraph()
            self.pieces.append(f"```{self._language}\n")
            self._language = ""
            self._code += 1
            return "\n```\n\n"
        if self._code:
            return ""
        if re.fullmatch("h[1-6]", tag):
            self._paragraph()
            self.pieces.append("#" * int(tag[1]) + " ")
            return "\n\n"
        if tag in ("ul", "ol"):
            self._lists.append("1. " if tag == "ol" else "- ")
            self._paragraph()
            return "\n\n"
        if tag == "li":
            self._line()
            self.pieces.append("  " * (len(self._lists) - 1) + (self._lists[-1] if self._lists else "- "))
            return "\n"
        if tag == "dt":
            self._paragraph()
            self.pieces.append("**")
            self._at_mark = True
            return "**\n\n"
        if tag in ("code", "tt") and not self._inside("dt"):
            self.pieces.append("`")
            return "`"
        if tag in ("strong", "b") and not self._inside("dt"):
            self.pieces.append("**")
            return "**"
        if tag in ("em", "i") and not self._inside("dt"):
            self.pieces.append("*")
            return "*"
        if tag == "a" and attributes.get("href", "").startswith("http") and len(attributes["href"]) < 60:
            self.pieces.append("[")
            return f"]({attributes['href']})"
        if tag in _BLOCKS:
            self._paragraph()
            return "\n\n"
        return ""

    def handle_endtag(self, tag: str) -> None:
        """Markdown of a closing tag, and of those inside it that the page left open."""
        if not any(tag == opened for opened, _, _ in self._open):
            return
        while self._open:
            opened, kind, end = self._open.pop()
            if opened == "pre" and end:
                self._code -= 1
                if self.pieces and self.pieces[-1].endswith("\n"):
                    end = end[1:]
            if opened in ("ul", "ol") and end and self._lists:
                self._lists.pop()
            if end.startswith(("*", "`", "]")):
                self._strip()
            if end:
                self.pieces.append(end)
            self._main -= "main" in kind
            self._skipped -= "skipped" in kind
            if opened == tag:
                return

    def handle_data(self, data: str) -> None:
        """Text; white space is folded outside code blocks."""
        if not self._visible():
            return
        if not self._code:
            data = re.sub(r"\s+", " ", data)
            if not self.pieces or self._at_mark or self.pieces[-1].endswith(("\n", " ")):
                data = data.lstrip()
        if data:
            self.pieces.append(data)
            self._at_mark = False

    def _visible(self) -> bool:
        return self._main > 0 and not self._skipped

    def _inside(self, tag: str) -> bool:
        return any(opened == tag for opened, _, _ in self._open[-4:])

    def _paragraph(self) -> None:
        """A blank line, unless a list's item or a definition has just begun."""
        if self.pieces and not self.pieces[-1].endswith(("\n\n", "- ", "1. ")):
            self._line()
            if not self._inside("li"):
                self.pieces.append("\n")

    def _line(self) -> None:
        if self.pieces and not self.pieces[-1].endswith("\n"):
            self.pieces.append("\n")

    def _strip(self) -> None:
        if self.pieces and not self._code:
            self.pieces[-1] = self.pieces[-1].rstrip(" ")
