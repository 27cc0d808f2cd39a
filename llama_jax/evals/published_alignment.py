"""The paper's own numbers of samples, red teaming and contamination: Figs. 7, 8, 21 and 29, section 4.3, Table 51.

Those of preference data and reward models stand in `reward/published.py`, of benchmarks and people's ratings in `published.py`.
"""

from llama_jax.markdown import Table

# The axis ends near 20 answers, though the caption says 100.
FIGURE_7 = Table.read("""
the paper's (Fig. 7, read off), N | best | median
1                                 | 0.54 | 0.54
20                                | 0.67 | 0.54
""")

# Of 10 to 100 answers of the RLHF model, those at the temperatures 1.2 to 1.3 are best.
FIGURE_8 = Table.read("""
the paper's (Fig. 8, read off), N | temperature | best
1                                 | up to 1.3   | 0.50 to 0.54
1                                 | 1.5         | 0.34
10 to 100                         | 1.2 to 1.3  | the highest, RLHF
100                               | 0.6 to 1.5  | 0.69 to 0.73
""")

FIGURE_21 = Table.read("""
the paper's at T = 1.4 (Fig. 21, read off) | factual | creative
SFT                                        | 77      | 75.5
RLHF V1                                    | 83      | 80
RLHF V2                                    | 88      | 82
RLHF V3                                    | 93      | 85
""")

# Three people's ratings of 1 to 7, their median.
FIGURE_29 = Table.read("""
the paper's mean score (Fig. 29, read off) | lowest rating | highest rating
helpfulness                                | 0.24          | 0.55
safety                                     | 0.29          | 0.78
""")

GAMMA = Table.read("""
the paper's (4.3), per person and hour | at first | at last
7B                                     | 1.8      | 0.45
""")
REJECTED = Table.read("""
the paper's (4.3)                                                     | %
prompts of one round that the next candidate rejects, mean of rounds | 90
""")

# X and mu are percent. HellaSwag and Humanities are affected, and through these MMLU-Overall of 70B.
TABLE_51 = Table.read("""
the paper's (Table 51) | L  | subset    | % tokens | n      | X %  | mu % | Z
HellaSwag, 70B         | 40 | clean     | 0        | 7,391  | 80.0 | 82.5 | -5.73
HellaSwag, 70B         | 40 | not clean | 67.5     | 2,651  | 89.5 | 82.4 | 9.56
HellaSwag, 70B         | 40 | not dirty | 11.5     | 9,194  | 81.6 | 82.5 | -2.27
HellaSwag, 70B         | 40 | dirty     | 86.1     | 848    | 92.2 | 82.5 | 7.42
HellaSwag, 7B          | 40 | clean     | 0        | 7,391  | 70.5 | 73.3 | -5.46
HellaSwag, 7B          | 40 | not clean | 67.5     | 2,651  | 81.3 | 73.4 | 9.17
HellaSwag, 7B          | 40 | not dirty | 11.5     | 9,194  | 72.4 | 73.4 | -2.06
HellaSwag, 7B          | 40 | dirty     | 86.1     | 848    | 83.7 | 73.3 | 6.84
MMLU-Humanities, 70B   | 50 | clean     | 0.05     | 3,996  | 62.2 | 65.3 | -4.08
MMLU-Humanities, 70B   | 50 | not clean | 85.12    | 709    | 82.7 | 65.3 | 9.71
MMLU-Humanities, 70B   | 50 | not dirty | 2.73     | 4,185  | 62.7 | 65.3 | -3.50
MMLU-Humanities, 70B   | 50 | dirty     | 94.5     | 520    | 85.8 | 65.3 | 9.80
MMLU-Humanities, 7B    | 50 | clean     | 0.05     | 3,996  | 40.8 | 42.9 | -2.75
MMLU-Humanities, 7B    | 50 | not clean | 85.2     | 709    | 54.9 | 42.8 | 6.50
MMLU-Humanities, 7B    | 50 | not dirty | 2.73     | 4,185  | 41.1 | 42.9 | -2.25
MMLU-Humanities, 7B    | 50 | dirty     | 94.5     | 520    | 56.9 | 42.8 | 6.49
MMLU-Overall, 70B      | 50 | clean     | 0.02     | 11,862 | 68.0 | 68.9 | -2.00
MMLU-Overall, 70B      | 50 | not clean | 84.7     | 2,180  | 73.5 | 68.9 | 4.64
MMLU-Overall, 70B      | 50 | not dirty | 3.18     | 12,506 | 67.7 | 68.9 | -2.75
MMLU-Overall, 70B      | 50 | dirty     | 94.4     | 1,536  | 78.2 | 68.9 | 7.87
""")
