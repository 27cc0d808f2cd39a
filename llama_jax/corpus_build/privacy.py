"""Personal information (paper section 2.1: sites known to hold much of it about private people are left out).

Three means: sites by block list, documents dense in addresses and numbers of people, and masks. What is found is counted by
kind. Patterns find what has a form; names have none, so a block list stays the most important of the three.
"""

import bisect
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence

from llama_jax.corpus_build.document import host_of

# Domains with the reason. A start, by what the sites are for; pass a file for more (`read_block_list`).
BLOCKED_DOMAINS: Mapping[str, str] = {
    **dict.fromkeys(
        ("facebook.com", "instagram.com", "linkedin.com", "vk.com", "ok.ru", "myspace.com", "xing.com", "snapchat.com"),
        "profiles of private people",
    ),
    **dict.fromkeys(
        (
            "whitepages.com", "spokeo.com", "beenverified.com", "intelius.com", "truepeoplesearch.com", "radaris.com",
            "fastpeoplesearch.com", "peekyou.com", "mylife.com", "pipl.com", "zabasearch.com", "peoplefinders.com",
            "411.com", "192.com", "anywho.com", "truthfinder.com", "instantcheckmate.com", "usphonebook.com",
        ),
        "people search",
    ),
    **dict.fromkeys(("mugshots.com", "arrests.org", "busted.news", "jailbase.com"), "arrest records"),
    **dict.fromkeys(("ancestry.com", "myheritage.com", "geni.com", "findagrave.com", "legacy.com"), "family records"),
    **dict.fromkeys(("match.com", "okcupid.com", "tinder.com", "pof.com", "badoo.com"), "dating profiles"),
    **dict.fromkeys(("pastebin.com", "doxbin.com", "justpaste.it"), "leaked personal data"),
    **dict.fromkeys(("rocketreach.co", "zoominfo.com", "contactout.com", "lusha.com", "signalhire.com"), "contact data"),
}  # fmt: skip


def read_block_list(lines: list[str], name: str = "block list") -> dict[str, str]:
    """Domains and reasons from lines `domain<TAB>reason`; # begins a comment."""
    blocked = {}
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        domain, tab, reason = line.partition("\t")
        if not tab or not reason.strip() or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", domain.strip()):
            raise ValueError(f"{name}:{number}: expected a domain, a tab and a reason, got {line!r}")
        blocked[domain.strip().lower()] = reason.strip()
    return blocked


def blocked_reason(url: str, blocked: Mapping[str, str] = BLOCKED_DOMAINS) -> str | None:
    """Why the site of `url` is on the list; the entry example.com holds for www.example.com too. None if it is not."""
    host = host_of(url).rstrip(".").lower()
    parts = host.split(".")
    for i in range(len(parts) - 1):
        if reason := blocked.get(".".join(parts[i:])):
            return reason
    return None


def find(text: str) -> dict[str, list[tuple[int, int]]]:
    """Spans (start, end) of what looks like personal information, by kind; kinds without any are left out."""
    found: dict[str, list[tuple[int, int]]] = {}
    for kind, hint, pattern, check in _PATTERNS:
        if hint(text):
            known = found.get(kind, [])
            spans = [m.span() for m in pattern.finditer(text) if check is None or check(m)]
            if spans := [span for span in spans if not _overlaps(span, known)]:
                found[kind] = sorted([*known, *spans])
    return found


def _overlaps(span: tuple[int, int], known: Sequence[tuple[int, int]]) -> bool:
    """Whether a span shares a character with one of some that are sorted and apart."""
    at = bisect.bisect(known, span)
    return any(start < span[1] and span[0] < end for start, end in known[max(at - 1, 0) : at + 1])


def density(found: Mapping[str, list[tuple[int, int]]], text: str) -> float:
    """Findings per 1,000 characters."""
    return 1000 * sum(map(len, found.values())) / max(len(text), 1)


def mask(text: str, found: Mapping[str, list[tuple[int, int]]]) -> str:
    """The text with every finding replaced by its kind in brackets; of findings that overlap, the first."""
    spans = sorted((start, end, kind) for kind, of_kind in found.items() for start, end in of_kind)
    parts, at = [], 0
    for start, end, kind in spans:
        if start >= at:
            parts += [text[at:start], f"[{kind}]"]
            at = end
    return "".join([*parts, text[at:]])


def _not_a_login(match: re.Match[str]) -> bool:
    return not match.group().startswith("git@")  # the user of every repository's address


def _luhn(match: re.Match[str]) -> bool:
    digits = [int(c) for c in match.group() if c.isdigit()]
    odd, even = digits[-1::-2], [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(odd) + sum(even)) % 10 == 0 and len(set(digits)) > 1


def _iban(match: re.Match[str]) -> bool:
    plain = re.sub(r"\s", "", match.group())
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def _public_address(match: re.Match[str]) -> bool:
    parts = [int(part) for part in match.group().split(".")]
    private = parts[0] in (0, 10, 127, 255) or parts[:2] == [192, 168] or (parts[0] == 172 and 16 <= parts[1] < 32)
    return max(parts) < 256 and not private and min(parts[0], 224) < 224


def _public_ipv6(match: re.Match[str]) -> bool:
    try:
        return bool(ipaddress.IPv6Address(match.group()))
    except ValueError:
        return False


def _phone(match: re.Match[str]) -> bool:
    return 9 <= sum(c.isdigit() for c in match.group().removeprefix("00")) <= 15


def _labelled(match: re.Match[str]) -> bool:
    return _PHONE_LABEL.search(match.string, max(match.start() - 24, 0), match.start()) is not None


def _named_street(match: re.Match[str]) -> bool:
    """Whether a number, capital words and a street word are an address rather than a headline, a court or a year's event."""
    words = {word.capitalize() for word in match["name"].split()}
    if words & _NO_NAMES or (match["street"].lower() in ("court", "ct") and words & _COURTS):
        return False
    year = 1700 <= int(match["number"]) < 2100
    return not (year and re.match(r" [A-Za-z]", match.string[match.end() : match.end() + 2]))  # 1929 Wall Street Crash


# Of numbers as they are written within a country, those that say what they are, in the larger languages of the web.
_PHONE_LABEL = re.compile(
    r"(?:\b(?:tel|t[ée]l[ée]phone?|telefoon|telefone?|tel[ée]fono|phone|fax|mobile?|m[óo]vil|cell|handy|portable|whatsapp|t[ée]l)"
    r"|тел|телефон|факс|電話|电话|手机|传真|전화)(?:\.|\b)(?: ?(?:no|nr|number))?[.:：]{0,2}\s{0,3}\Z",
    re.IGNORECASE,
)
_DIGIT = re.compile(r"[0-9]").search
_STREETS = "Street St Avenue Ave Road Rd Boulevard Blvd Lane Ln Drive Dr Court Ct Square Sq Terrace Way".split()
_STREET = "|".join([*_STREETS, *map(str.upper, _STREETS)])  # in small letters they are words of any sentence
# Capital words of headlines and titles that no street is named after, and kinds of courts of law.
_NO_NAMES = frozenset(
    "The A An To Of In On At By For And Or With From That This Is Are Was Can Will You Your My Our His Her Their Its No Not "
    "Ways Things Reasons Tips Steps Years Year Days Times People Best Top".split()
)
_COURTS = frozenset("Supreme High District Superior Federal Circuit Appeals County Crown Municipal Tennis Food".split())
# Kind, a cheap look before the pattern, the pattern, a check of what it found. Patterns begin with a set of characters and then
# look back over it: from a set `re` jumps to the next candidate, while it tries a leading \b at each character.
_PATTERNS: Sequence[tuple[str, Callable[[str], object], re.Pattern[str], Callable[[re.Match[str]], bool] | None]] = (
    ("email", lambda t: "@" in t, re.compile(r"\b[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,24}\b"), _not_a_login),
    (
        "iban", re.compile(r"[0-9](?<=\b[A-Z]{2}[0-9])\d").search,
        re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban,
    ),
    (
        "credit card", _DIGIT,
        re.compile(r"[3-6](?<!\w[3-6])(?:\d{3}[ -]?(?:\d{4}[ -]?){2}\d{1,7}\b|(?<=3)\d{3}[ -]?\d{6}[ -]?\d{5}\b)"), _luhn,
    ),
    (
        "identity number", _DIGIT,
        re.compile(r"[0-8](?<!\w[0-8])\d\d(?<!000)(?<!666)-(?!00)\d{2}-(?!0000)\d{4}\b"), None,
    ),
    (
        "phone", _DIGIT,
        # International with +, or grouped as in North America; digits without any grouping are too often something else.
        re.compile(r"[+(0-9](?<![\w.][+(0-9])(?:(?<=\+)\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
                   r"|(?:(?<=1)[ .-](?:\(\d{3}\) ?|\d{3}[.-])|(?<=\()\d{3}\) ?|(?<=\d)\d\d[.-])\d{3}[ .-]\d{4})"
                   r"(?![\w.-]{0,20}\d)"),
        _phone,
    ),
    (
        "phone", _DIGIT,
        # International with 00 and a space behind the country, or an area code with its 0 in brackets.
        re.compile(r"[0(](?<![\w.+][0(])(?:(?<=0)0[1-9]\d{0,2}[ .-](?:\(\d{1,4}\)[ .-]?)?[1-9]\d{0,3}(?:[ .-]?\d{2,4}){1,4}"
                   r"|(?<=\()0\d{1,5}\)[ ./-]{0,2}\d{2,4}(?:[ ./-]?\d{2,4}){1,4})(?![\w.-]{0,20}\d)"),
        _phone,
    ),
    ("phone", _DIGIT, re.compile(r"[(0-9](?<![\w.+][(0-9])(?:[ ()/.-]{0,3}\d){6,14}(?![\w.-]{0,20}\d)"), _labelled),
    (
        "ip address", _DIGIT,
        re.compile(r"[0-9](?<![\w.][0-9])\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w.]{0,20}\d)"), _public_address,
    ),
    (
        "ip address", re.compile("[23][0-9a-fA-F]{3}:").search,  # of version 6, the public ones
        re.compile(r"[23](?<![\w:.][23])[0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:]|\.\d)"), _public_ipv6,
    ),
    (
        "address", _DIGIT,  # as in English
        re.compile(r"(?P<number>[0-9](?<!\w[0-9])\d{0,4})[A-Z]? (?:[NSEW]\.? )?"
                   r"(?P<name>(?:(?:[A-Z][A-Za-z'’]+|\d{1,3}(?:st|nd|rd|th|ST|ND|RD|TH)) ){1,3})"
                   rf"(?P<street>{_STREET})\b(?:[.,]? (?i:apt|suite|unit) ?#?\w+)?"),
        _named_street,
    ),
)  # fmt: skip
