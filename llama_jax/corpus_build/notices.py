"""What a data team should look at first in a new corpus: facts of the report that are beyond what is usual, as sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.corpus_build.evaluation import Evaluation
from llama_jax.corpus_build.mixture import Share, shortfall
from llama_jax.corpus_build.profile import Profile, ranked

LEAST_KEPT = 0.5  # share of the documents read that should be left
LARGEST_RULE = 0.25  # share of a source's documents that one rule may remove
LARGEST_COPIES = 0.25  # exact and near, of the documents that passed the filters
LINES_SEEN = 0.05  # of held-out lines: beyond it held-out figures are of recitation
EPOCHS = 4.0  # up to which repeated text is nearly as good as new (Muennighoff et al. 2023)


def notices(
    counts: Mapping[str, Mapping[str, Any]],
    profiles: Mapping[str, Profile],
    shares: Sequence[Share],
    evaluation: Evaluation,
) -> list[str]:
    """Sentences, the sources in their order; none for a corpus that is as it should be."""
    found = []
    for source, row in counts.items():
        read = max(row["documents_read"], 1)
        if (kept := row["documents"] / read) < LEAST_KEPT:
            found.append(f"{source}: {kept:.0%} of the documents are left to train on.")
        for (step, rule), count in ranked(profiles[source].removed)[:1]:
            if count / read > LARGEST_RULE:
                found.append(f"{source}: {step}: {rule} alone removed {count / read:.0%} of the documents; read its samples.")
        copies, passed = row["duplicates"] + row["near_duplicates"], max(read - row["filtered"], 1)
        if copies / passed > LARGEST_COPIES:
            found.append(f"{source}: {copies / passed:.0%} of what passed the filters were copies.")
        if row["held_out_lines_seen"] > LINES_SEEN:
            found.append(f"{source}: {row['held_out_lines_seen']:.0%} of the held-out lines stand in the training text too.")
        if row["bad_rows"]:
            found.append(f"{source}: {row['bad_rows']:,} rows could not be read.")
        if row["bad_files"]:
            found.append(f"{source}: {row['bad_files']:,} files could not be read to their ends; nobody knows what they held.")
    if evaluation.too_short:
        share = f"{evaluation.too_short:,} of {len(evaluation.texts):,}"
        found.append(f"{share} evaluation samples have fewer words than leak_ngram and were not looked for.")
    if short := shortfall(shares):
        found.append(short)
    for share in shares:
        if round(share.epochs, 1) > EPOCHS:  # as it is printed
            found.append(f"{share.source}: will be seen {share.epochs:.1f} times; beyond {EPOCHS:g} epochs little is learnt.")
    return found
