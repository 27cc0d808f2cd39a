"""What a crawl does to good text, by code: the raw side of an ablation on a machine without a crawl (paper section 2.1).

Every decision is drawn from the document's id, so the same documents give the same dirt in any order and on any machine. The
shares are choices of ours, not measurements of the web; each kind is one that some step of the pipeline is there for.
"""

import dataclasses
import html
import random
from collections.abc import Iterable, Iterator, Sequence

from llama_jax.corpus_build.document import Document

_SITES = 12
_TOPICS = "news sport weather shopping travel video music games jobs health money cars recipes fashion phones".split()
_NOTICES = (
    "We use cookies to improve your experience. By continuing to browse {site} you accept all cookies.",
    "Sign up for the {site} newsletter and never miss another story from our team!",
    "Copyright 2004-2019 {site}. All rights reserved. Terms of service. Privacy policy. Contact us.",
    "Share this page: Facebook | Twitter | Pinterest | Email | Print | Save to favourites on {site}",
    "You must be logged in to {site} to post a comment. Log in or register for free today.",
    "Advertisement. Story continues below this advertisement from the partners of {site}.",
    "Most read on {site} this week: ten things that you did not know about {topic} and {other}",
    "Your browser is out of date and may not show all the features of {site}. Please upgrade it.",
)
# Syllables of no language: what a machine translation or a wrong character set leaves of a text in another one.
_SYLLABLES = "ka ru mi sto vel ne pra lo shi un da gor fe ti bal ox qu zi mer han".split()
_GOODS = "cheap best free online buy discount casino loan pills watches replica download crack serial tickets".split()


@dataclasses.dataclass(frozen=True)
class Dirt:
    """Shares of the documents that each kind of dirt falls on, or that are added to them."""

    boilerplate: float = 0.6  # get the lines of a site around them
    copies: float = 0.3  # come again on another site, with a line changed
    mojibake: float = 0.15  # typographic quotes, read in the wrong encoding
    markup: float = 0.2  # come as HTML, script and navigation included
    junk: float = 0.3  # as many more documents are link farms, spam, hexadecimal dumps, or in no language

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise ValueError(f"{field.name}: expected a share between 0 and 1, got {getattr(self, field.name)}")


def dirty(documents: Iterable[Document], dirt: Dirt, *, seed: int) -> Iterator[Document]:
    """The documents as a crawl would have them, and its junk between them."""
    for document in documents:
        draw = random.Random(f"{seed}:{document.source}:{document.id}")
        yield soiled(document, dirt, draw)
        if draw.random() < dirt.copies:
            copy = dataclasses.replace(document, id=f"{document.id}#copy", text=altered(document.text, draw))
            yield soiled(copy, dirt, draw)
        if draw.random() < dirt.junk:
            yield Document(f"{document.id}#junk", junk(draw), document.source)


def soiled(document: Document, dirt: Dirt, draw: random.Random) -> Document:
    """One document with its dirt: encoding first, then the site's lines, then its markup."""
    text, site = document.text, draw.randrange(_SITES)
    if draw.random() < dirt.mojibake:
        text = mojibake(text)
    lined, marked = draw.random() < dirt.boilerplate, draw.random() < dirt.markup
    before, after = site_lines(site) if lined else ((), ())
    text = markup(text, before, after) if marked else "\n".join([*before, text, *after])
    return dataclasses.replace(document, text=text, url=f"http://site{site}.example.com/{draw.randrange(10**6)}")


def mojibake(text: str) -> str:
    """Typographic quotes in UTF-8, read as Windows-1252."""
    return text.replace("'", "’").replace(' "', " “").encode().decode("cp1252", "replace")


def altered(text: str, draw: random.Random) -> str:
    """The text with one of its lines left out, as mirrors have it: a near duplicate, no exact one."""
    lines = text.split("\n")
    del lines[draw.randrange(len(lines))]
    return "\n".join(lines) + "\n"


def site_lines(site: int) -> tuple[Sequence[str], Sequence[str]]:
    """Lines that stand above and below every text of a site."""
    draw, name = random.Random(site), f"site{site}.example.com"
    topics = draw.sample(_TOPICS, 8)
    menu = "Home | " + " | ".join(topic.title() for topic in topics) + f" | About {name}"
    notices = [n.format(site=name, topic=topics[0], other=topics[1]) for n in draw.sample(_NOTICES, 5)]
    return (menu, *notices[:2]), notices[2:]


def markup(text: str, before: Sequence[str], after: Sequence[str]) -> str:
    """The text as a page of HTML. Indented paragraphs stay as they are, in <pre>."""
    paragraphs = [
        f"<pre>{html.escape(part)}</pre>" if "\n " in part or part.startswith(" ") else f"<p>{html.escape(part)}</p>"
        for part in text.strip("\n").split("\n\n")
    ]
    links = "".join(f'<li><a href="/{i}">{html.escape(line)}</a></li>' for i, line in enumerate(before))
    foot = "".join(f"<div class='footer-text'>{html.escape(line)}</div>" for line in after)
    return (
        '<!DOCTYPE html><html><head><meta charset="utf-8"><script>window.dataLayer=window.dataLayer||[];'
        "function gtag(){dataLayer.push(arguments);}gtag('js',new Date());</script></head>"
        f"<body><nav><ul>{links}</ul></nav><article>{''.join(paragraphs)}</article><footer>{foot}</footer></body></html>"
    )


def junk(draw: random.Random) -> str:
    """A document with nothing to learn from."""
    size = draw.randrange(150, 900)
    kind = draw.randrange(4)
    if kind == 0:  # a link farm
        return "\n".join(f"http://{draw.choice(_GOODS)}-{draw.choice(_TOPICS)}{i}.example.com/" for i in range(size // 4))
    if kind == 1:  # spam
        return " ".join(draw.choice(_GOODS if draw.random() < 0.7 else _TOPICS) for _ in range(size)) + "\n"
    if kind == 2:  # a dump
        return "\n".join(f"{16 * i:08x}: {draw.getrandbits(256):064x}" for i in range(size // 8))
    words = ("".join(draw.choices(_SYLLABLES, k=draw.randrange(1, 4))) for _ in range(size))
    return " ".join(words) + ".\n"
