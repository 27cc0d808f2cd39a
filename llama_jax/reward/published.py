"""The paper's own numbers of preference data and reward models: Tables 6 to 8, 26, 28 and 29, Figs. 6, 25 and 26."""

from llama_jax.markdown import Table

# The rows add up to 1,577 more than the printed total.
TABLE_6 = Table.read("""
the paper's (Table 6) | comparisons | turns/dialog | tokens/example | tokens/prompt | tokens/response
Anthropic Helpful     |     122,387 | 3.0 | 251.5 |  17.7 |  88.4
Anthropic Harmless    |      43,966 | 3.0 | 152.5 |  15.7 |  46.4
OpenAI Summarize      |     176,625 | 1.0 | 371.1 | 336.0 |  35.1
OpenAI WebGPT         |      13,333 | 1.0 | 237.2 |  48.3 | 188.9
StackExchange         |   1,038,480 | 1.0 | 440.2 | 200.1 | 240.2
Stanford SHP          |      74,882 | 1.0 | 338.3 | 199.5 | 138.8
Synthetic GPT-J       |      33,139 | 1.0 | 123.3 |  13.0 | 110.3
Meta                  |   1,418,091 | 3.9 | 798.5 |  31.4 | 234.1
total                 |   2,919,326 | 1.6 | 595.7 | 108.2 | 216.9
""")

# Meta's own comparisons, by week.
TABLE_26 = Table.read("""
the paper's (Table 26) | comparisons | turns/dialog | tokens/example | tokens/prompt | tokens/response
1  |   5,561 | 4.4 |  547.1 | 25.2 | 159.3
2  |  17,072 | 4.0 |  554.6 | 22.4 | 170.7
3  |  30,146 | 3.9 |  603.3 | 19.6 | 195.5
4  |  36,206 | 3.9 |  652.8 | 45.3 | 182.9
5  |  49,375 | 3.7 |  603.9 | 46.7 | 163.1
6  |  57,746 | 4.1 |  654.5 | 28.2 | 198.1
7  |  84,388 | 3.9 |  662.2 | 27.5 | 210.0
8  |  95,235 | 3.6 |  670.4 | 32.9 | 212.1
9  | 127,235 | 3.6 |  674.9 | 31.3 | 214.8
10 | 136,729 | 3.7 |  723.9 | 30.5 | 230.2
11 | 136,868 | 3.8 |  811.9 | 32.2 | 251.1
12 | 181,293 | 3.9 |  817.0 | 30.8 | 250.9
13 | 210,881 | 4.2 |  905.9 | 30.3 | 255.6
14 | 249,356 | 4.3 | 1008.0 | 31.6 | 258.9
""")

# Of the safety comparisons (3.2.1).
SAFETY_BINS = Table.read("""
the paper's (3.2.1), % | chosen_safe | both_safe | both_unsafe
Meta safety            | 18          | 47        | 35
""")

FIGURE_25 = Table.read("""
the paper's (Fig. 25, read off), batch | significantly | better | slightly   | negligibly
1                                      | 18.3          | 27.7   | 28 to 33.5 | 25
14                                     | 9             | 21.3   | 28 to 33.5 | 38.5
""")

FIGURE_26 = Table.read("""
the paper's (Fig. 26, read off), batch | answers/prompt | max   | median
1                                      | 20             | 0.806 | 0.680
12                                     | 20             | 0.657 | 0.443
""")

# The paper's test sets: 1,000 held-out comparisons of each batch of Meta's, and the open sets' own.
TABLE_7 = Table.read("""
the paper's (Table 7), % | Meta help. | Meta safety | Anthropic help. | Anthropic harm. | OpenAI summ. | SHP  | avg
SteamSHP-XL              | 52.8       | 43.8        | 66.8            | 34.2            | 54.7         | 75.7 | 55.3
Open Assistant           | 53.8       | 53.4        | 67.7            | 68.4            | 71.7         | 55.0 | 63.0
GPT-4                    | 58.6       | 58.1        | -               | -               | -            | -    | -
Safety RM                | 56.2       | 64.5        | 55.4            | 74.7            | 71.7         | 65.2 | 64.3
Helpfulness RM           | 63.2       | 62.8        | 72.0            | 71.0            | 75.5         | 80.0 | 70.6
""")
TABLE_8 = Table.read("""
the paper's (Table 8), % | model          | significantly | better | slightly | negligibly | all
Meta safety              | Safety RM      | 94.3          | 76.3   | 65.7     | 55.3       | 64.5
Meta safety              | Helpfulness RM | 89.9          | 73.2   | 63.8     | 54.5       | 62.8
Meta helpfulness         | Safety RM      | 64.6          | 57.5   | 53.8     | 52.2       | 56.2
Meta helpfulness         | Helpfulness RM | 80.7          | 67.5   | 60.9     | 54.7       | 63.2
""")

# Helpfulness models on Meta's helpfulness test set, by margin.
TABLE_28 = Table.read("""
the paper's (Table 28), % | significantly | better | slightly | negligibly | all
none                      | 79.1          | 66.9   | 59.8     | 54.5       | 62.5
small                     | 80.4          | 67.3   | 60.4     | 55.0       | 63.0
large                     | 80.7          | 67.5   | 60.5     | 54.3       | 62.9
""")

# Safety models on Meta's safety test set. The weight of the loss is not printed.
TABLE_29 = Table.read("""
the paper's (Table 29), %  | average | chosen safe | both safe | both unsafe | unsafe recall
without the auxiliary loss | 63.7    | 93.0        | 56.0      | 59.5        | 73.0
with it                    | 64.5    | 94.3        | 56.9      | 59.9        | 90.4
""")

# The best of the 14 batches of each size; GPT-4 and Open Assistant are lines.
FIGURE_6 = Table.read("""
the paper's best (Fig. 6, read off), % | significantly | all
7B                                     | 73.8          | 61.0
13B                                    | 75.6          | 61.4
70B                                    | 81.2          | 63.4
GPT-4                                  | 74.3          | 58.6
Open Assistant                         | 58.6          | 53.8
""")
