"""Training data of several files, of which some are taken whole and others fill a share of the mix."""

import logging
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from llama_jax.config import ConfigError

T = TypeVar("T")

log = logging.getLogger(__name__)


def files_of(files: str | Sequence[str]) -> tuple[str, ...]:
    """What a field names that holds one file or several."""
    return (files,) if isinstance(files, str) else tuple(files)


def check_files(field: str, files: Sequence[str], *, some: bool = False) -> None:
    """ConfigError for a field that names files and an empty name among them, as of a shell variable that is not set; with
    `some`, for no file, too."""
    if some and not files:
        raise ConfigError(f"{field}: expected at least one file, got none")
    if not all(file.strip() for file in files):
        raise ConfigError(f"{field}: expected a file, got nothing")


def whole_or_share(
    paths: Sequence[str], shares: Sequence[float], *, group: str = "data", field: str = "train"
) -> tuple[float, ...]:
    """The share of each file of a field of a config's group, 0 for one that is taken whole; without any given, all are.

    Raises:
      ConfigError: files and shares that make no mix.
    """
    check_files(f"{group}.{field}", paths, some=True)
    shares = tuple(shares) or (0.0,) * len(paths)
    if len(paths) != len(shares):
        raise ConfigError(
            f"{group}.shares: expected one for each of the {len(paths)} files of {group}.{field}, got {len(shares)}"
        )
    if shares and (min(shares) < 0 or sum(shares) > 1 - 1e-9 or 0 not in shares):
        raise ConfigError(
            f"{group}.shares: expected 0 for a file that is taken whole, at least one of them, and of the others less than 1 "
            f"in all; got {shares}"
        )
    return shares


def mix(files: Sequence[Sequence[T]], shares: Sequence[float], *, names: Sequence[str], seed: int, unit: str) -> list[T]:
    """Files with share 0 whole, then of each other as many rows, drawn at random, as give it its share.

    So are the paper's mixes made (section 3.2.2): helpfulness = all helpfulness data and an equal amount of the rest, sampled
    uniformly; safety = 90 % safety data and 10 % helpfulness data. A file that has too few rows for its share gives all, with a
    warning that counts them in `unit`.
    """
    mixed = [row for rows, share in zip(files, shares, strict=True) if not share for row in rows]
    total = len(mixed) / (1 - sum(shares))
    for number, (name, rows, share) in enumerate(zip(names, files, shares, strict=True)):
        if not share:
            continue
        wanted = round(total * share)
        if wanted > len(rows):
            log.warning("%s: a share of %g is %d %s, and it has %d: all are taken", name, share, wanted, unit, len(rows))
        # A file may be sorted by source or kind, so its first rows would not stand for the others.
        drawn = np.random.default_rng((seed, number)).permutation(len(rows))[:wanted]
        mixed += [rows[i] for i in sorted(drawn)]
    return mixed
