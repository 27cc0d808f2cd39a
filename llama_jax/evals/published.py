"""The paper's own numbers, to stand beside ours: Tables 3, 4, 11, 14 to 25 and 44 to 50, Figs. 1, 3, 12, 17 to 19 and 30
(percent unless a table says otherwise).

L1 is Llama 1, L2 Llama 2. A column is named as its task in `evals/task_names.py`, or as its group; "@" is another number of
examples than Table 3's, "/" another metric. `cell` looks a result's column up.
"""

# ruff: noqa: E501 (a table is read by its columns)

from collections.abc import Mapping

from llama_jax.evals.groups import SHOTS_AND_METRICS, family_of, plain

Rows = dict[str, dict[str, float]]


def _parse(text: str) -> Rows:
    """{model: {column: value}} of a table whose cells hold no space; "-" is no value."""
    head, *rows = (line.split() for line in text.strip().splitlines())
    return {
        row[0].replace("_", " "): {name: float(cell) for name, cell in zip(head[1:], row[1:], strict=True) if cell != "-"}
        for row in rows
    }


# Table 3: averages by group.
TABLE_3 = _parse("""
model  code  commonsense  world_knowledge  reading  math  mmlu  bbh  agieval
MPT_7B      20.5  57.4  41.0  57.5  4.9   26.8  31.0  23.5
MPT_30B     28.9  64.9  50.0  64.7  9.1   46.9  38.0  33.8
Falcon_7B   5.6   56.1  42.8  36.0  4.6   26.2  28.0  21.2
Falcon_40B  15.2  69.2  56.7  65.7  12.6  55.4  37.1  37.0
L1_7B       14.1  60.8  46.2  58.5  6.95  35.1  30.3  23.9
L1_13B      18.9  66.1  52.6  62.3  10.9  46.9  37.0  33.9
L1_33B      26.0  70.0  58.4  67.6  21.4  57.8  39.8  41.7
L1_65B      30.7  70.7  60.5  68.6  30.8  63.4  43.5  47.6
L2_7B       16.8  63.9  48.9  61.3  14.6  45.3  32.6  29.3
L2_13B      24.5  66.9  55.4  65.8  28.7  54.8  39.4  39.1
L2_34B      27.8  69.9  58.7  68.0  24.2  62.6  44.1  43.4
L2_70B      37.5  71.9  63.6  69.4  35.2  68.9  51.2  54.2
""")

# Tables 19 (MMLU), 20 (standard benchmarks) and 25 (mathematics).
TABLES_19_20_25 = _parse("""
model  boolq  piqa  siqa  hellaswag  winogrande  arc_easy  arc_challenge  openbookqa  commonsense_qa  mmlu  mmlu_humanities  mmlu_stem  mmlu_social_sciences  mmlu_other  gsm8k  math
MPT_7B      75.0  80.6  48.5  76.4  68.3  70.2  42.6  51.4  21.3  26.8  26.7  25.3  27.1  28.2  6.8   3.0
MPT_30B     79.0  81.9  48.9  79.9  71.0  76.5  50.6  52.0  58.2  46.9  44.5  39.0  52.8  52.9  15.2  3.1
Falcon_7B   67.5  76.7  47.2  74.1  66.3  70.0  42.4  51.6  20.8  26.2  26.4  26.2  24.7  27.4  6.8   2.3
Falcon_40B  83.1  82.4  50.1  83.6  76.9  79.2  54.5  56.6  70.4  55.4  49.3  45.5  65.4  65.0  19.6  5.5
L1_7B       76.5  79.8  48.9  76.1  70.1  72.8  47.6  57.2  33.6  35.1  34.0  30.5  38.3  38.1  11.0  2.9
L1_13B      78.1  80.1  50.4  79.2  73.0  74.8  52.7  56.4  62.0  46.9  45.0  35.8  53.8  53.3  17.8  3.9
L1_33B      83.1  82.3  50.4  82.8  76.0  80.0  57.8  58.6  72.5  57.8  55.8  46.0  66.7  63.4  35.6  7.1
L1_65B      85.3  82.8  52.3  84.2  77.0  78.9  56.0  60.2  74.0  63.4  61.8  51.7  72.9  67.4  50.9  10.6
L2_7B       77.4  78.8  48.3  77.2  69.2  75.2  45.9  58.6  57.8  45.3  42.9  36.4  51.2  52.2  14.6  2.5
L2_13B      81.7  80.5  50.3  80.7  72.8  77.3  49.4  57.0  67.3  54.8  52.8  44.1  62.6  61.1  28.7  3.9
L2_34B      83.7  81.9  50.9  83.3  76.7  79.4  54.5  58.2  74.3  62.6  59.4  52.1  71.8  69.2  42.2  6.24
L2_70B      85.0  82.8  50.7  85.3  80.2  80.2  57.4  60.2  78.5  68.9  65.0  58.0  80.3  74.6  56.8  13.5
""")

# Tables 21 (code), 22 (NaturalQuestions, TriviaQA) and 23 (SQuAD, QuAC).
TABLES_21_22_23 = _parse("""
model  humaneval  humaneval/pass@100  mbpp  mbpp/pass@80  nq_open@0  nq_open@1  nq_open  nq_open@64  triviaqa@0  triviaqa@1  triviaqa  triviaqa@64  squad  squad@1  squad@4  squad@5  quac  quac@1
MPT_7B      18.3  -     22.6  -     11.6  17.8  20.8  22.7  55.7  59.6  61.2  61.6  59.5  62.8  62.6  62.7  38.0  37.7
MPT_30B     25.0  -     32.8  -     15.8  23.0  26.6  29.3  68.0  71.3  73.3  73.6  74.7  74.2  72.4  74.2  40.4  41.1
Falcon_7B   0.0   -     11.2  -     15.7  18.1  21.0  24.0  52.6  56.8  64.6  61.1  16.4  16.0  16.9  17.5  24.0  18.8
Falcon_40B  0.6   -     29.8  -     26.3  29.5  33.5  35.5  74.6  78.6  79.9  79.6  72.9  73.1  71.7  71.0  41.2  43.3
L1_7B       10.5  36.5  17.7  56.2  16.8  18.7  22.0  26.1  63.3  67.4  70.4  71.0  60.0  62.3  63.3  62.8  38.9  32.0
L1_13B      15.8  52.5  22.0  64.0  20.1  23.4  28.1  31.9  70.1  74.4  77.1  77.9  68.9  68.4  66.4  66.7  39.9  36.5
L1_33B      21.7  70.7  30.2  73.4  24.9  28.3  32.9  36.0  78.7  80.7  83.8  83.6  75.5  77.0  76.3  75.6  44.1  40.3
L1_65B      23.7  79.3  37.7  76.8  23.8  31.0  35.0  39.9  81.7  84.5  85.9  86.0  79.4  80.0  78.3  77.9  41.0  39.8
L2_7B       12.8  45.6  20.8  62.8  16.4  22.7  25.7  29.5  65.8  68.9  72.1  73.7  67.2  72.3  72.6  72.5  39.4  39.7
L2_13B      18.3  60.2  30.6  69.0  16.1  28.0  31.2  34.6  73.1  77.2  79.6  79.4  72.9  72.1  70.6  71.3  42.7  44.8
L2_34B      22.6  77.2  33.0  76.1  25.1  30.0  32.8  39.9  81.0  83.3  84.5  84.6  77.4  78.8  77.5  77.5  42.9  44.4
L2_70B      29.9  89.0  45.0  81.4  25.3  33.0  39.5  44.3  82.4  85.0  87.6  87.5  80.7  82.6  81.9  81.9  42.4  49.3
""")

# Table 24: AGIEval, English tasks.
TABLE_24 = _parse("""
model  agieval  agieval:aqua-rat  agieval:logiqa-en  agieval:lsat-ar  agieval:lsat-lr  agieval:lsat-rc  agieval:sat-en  agieval:sat-en-without-passage  agieval:sat-math
MPT_7B      23.5  27.6  23.0  18.7  21.2  20.8  25.2  32.5  23.6
MPT_30B     33.8  28.0  28.7  23.9  35.1  37.9  63.1  36.9  27.7
Falcon_7B   21.2  21.7  22.3  16.1  17.3  20.4  26.2  23.8  26.4
Falcon_40B  37.0  18.5  36.4  19.6  40.2  45.7  58.7  58.7  32.7
L1_7B       23.9  18.9  24.6  26.1  19.2  21.9  33.0  32.5  22.3
L1_13B      33.9  20.1  34.9  22.2  31.6  39.8  52.9  45.1  29.5
L1_33B      41.7  18.9  37.3  18.7  48.0  59.5  74.8  44.7  35.0
L1_65B      47.6  23.6  42.1  23.9  56.7  63.6  83.0  48.1  41.8
L2_7B       29.3  23.2  31.0  23.9  22.4  32.7  43.2  37.4  28.2
L2_13B      39.1  21.7  38.1  23.0  41.0  54.6  62.1  46.1  27.3
L2_34B      43.4  19.3  40.7  21.3  47.5  62.1  77.2  49.0  32.7
L2_70B      54.2  23.2  48.8  25.7  70.2  76.6  86.9  53.4  41.8
""")

# Tables 11, 14, 44 (TruthfulQA: true and informative, true, informative) and 45 (ToxiGen, % toxic).
TABLES_44_45 = _parse("""
model  truthfulqa  truthfulqa_true  truthfulqa_informative  toxigen  toxigen:asian  toxigen:mexican  toxigen:muslim  toxigen:physical_disability  toxigen:jewish  toxigen:middle_east  toxigen:chinese  toxigen:mental_disability  toxigen:latino  toxigen:native_american  toxigen:women  toxigen:black  toxigen:lgbtq
MPT_7B           29.13  36.72  92.04  22.32  15.40  33.55  23.54  17.09  26.12  23.20  16.25  17.63  28.40  19.52  24.34  25.04  20.03
MPT_30B          35.25  40.27  94.74  22.61  15.74  31.49  19.04  21.68  26.82  30.60  13.87  24.36  16.51  32.68  15.56  25.21  20.32
Falcon_7B        25.95  29.01  96.08  14.53  9.06   18.30  17.34  8.29   19.40  12.99  10.07  10.26  18.03  15.34  17.32  16.75  15.73
Falcon_40B       40.39  44.80  95.23  23.44  19.59  29.61  25.83  13.54  29.85  23.40  25.55  29.10  23.20  17.31  21.05  23.11  23.52
L1_7B            27.42  32.31  94.86  23.00  16.65  30.72  26.82  16.58  26.49  22.27  17.16  19.71  28.67  21.71  29.80  23.01  19.37
L1_13B           41.74  45.78  95.72  23.08  18.80  32.03  25.18  14.72  28.54  21.11  18.76  15.71  30.42  20.52  27.15  25.21  21.85
L1_33B           44.19  48.71  95.23  22.57  16.87  32.24  21.53  16.24  28.54  22.04  19.91  18.27  29.88  18.13  25.90  24.53  19.37
L1_65B           48.71  51.29  96.82  21.77  14.27  31.59  21.90  14.89  23.51  22.27  17.16  18.91  28.40  19.32  28.71  22.00  20.03
L2_7B            33.29  39.53  93.02  21.25  16.53  31.15  22.63  15.74  26.87  19.95  15.79  19.55  25.03  18.92  21.53  22.34  20.20
L2_13B           41.86  45.65  96.08  26.10  21.29  37.25  22.81  17.77  32.65  24.13  21.05  20.19  35.40  27.69  26.99  28.26  23.84
L2_34B           43.45  46.14  96.7   21.19  16.76  29.63  23.36  14.38  27.43  19.49  18.54  17.31  26.38  18.73  22.78  21.66  19.04
L2_70B           50.18  53.37  96.21  24.60  21.29  32.90  25.91  16.92  30.60  21.35  16.93  21.47  30.42  20.12  31.05  28.43  22.35
ChatGPT          78.46  79.92  98.53  0.20   0.23   0.22   0.18   0      0.19   0      0.46   0      0.13   0      0.47   0      0.66
MPT-instr_7B     29.99  35.13  94.37  16.33  15.86  28.76  11.31  9.64   18.84  14.62  15.33  16.51  25.3   13.94  12.95  17.94  11.26
Falcon-instr_7B  28.03  41.00  85.68  7.89   6.23   9.15   6.02   7.28   11.19  6.73   8.01   7.53   8.61   8.57   9.05   7.78   6.46
L2-Chat_7B       57.04  60.59  96.45  0.00   0      0      0      0      0      0      0      0      0      0      0      0      0
L2-Chat_13B      62.18  65.73  96.45  0.00   0      0      0      0      0      0      0      0      0      0      0      0      0
L2-Chat_34B      67.20  70.01  97.06  0.02   0.11   0      0      0.17   0      0      0      0      0      0      0      0      0
L2-Chat_70B      64.14  67.07  97.06  0.01   0      0      0      0      0      0      0      0      0      0      0.16   0      0
""")

# Tables 46 to 50: BOLD, mean VADER score in hundredths.
TABLES_46_50 = _parse("""
model  bold:Asian_Americans  bold:African_Americans  bold:European_Americans  bold:Hispanic_and_Latino_Americans  bold:American_actors  bold:American_actresses  bold:judaism  bold:christianity  bold:islam  bold:buddhism  bold:sikhism  bold:left-wing  bold:right-wing  bold:communism  bold:socialism  bold:democracy  bold:liberalism  bold:populism  bold:conservatism  bold:nationalism  bold:anarchism  bold:capitalism  bold:fascism  bold:metalworking_occupations  bold:sewing_occupations  bold:healthcare_occupations  bold:computer_occupations  bold:film_and_television_occupations  bold:artistic_occupations  bold:scientific_occupations  bold:entertainer_occupations  bold:dance_occupations  bold:nursing_specialties  bold:writing_occupations  bold:professional_driver_types  bold:engineering_branches  bold:mental_health_occupations  bold:theatre_personnel  bold:corporate_titles  bold:industrial_occupations  bold:railway_industry_occupations
MPT_7B           38  34  25  39  30  43  39  38  31  27  7   20  31  20  33  31  59  19  52  26  10  35  -15  24  28  38  53  35  36  23  33  33  53  32  13  22  29  43  59  36  38
MPT_30B          38  28  23  33  29  41  33  28  20  30  19  19  29  12  31  26  59  40  61  25  24  30  -17  23  18  34  48  37  30  24  31  31  45  32  17  21  29  38  46  29  24
Falcon_7B        36  29  26  47  21  33  25  35  20  25  22  5   18  16  28  28  40  18  51  23  21  27  11   22  23  35  42  35  32  22  30  26  46  31  23  20  32  37  52  19  26
Falcon_40B       36  32  29  48  29  37  26  28  26  31  19  24  18  29  25  30  51  10  50  25  19  28  -13  24  27  30  44  41  36  25  32  31  47  29  5   25  40  44  57  30  29
L1_7B            41  32  28  46  31  46  37  30  24  38  17  16  22  17  35  30  35  15  37  18  17  20  -23  27  26  34  54  36  39  26  28  33  45  33  17  24  31  44  57  39  35
L1_13B           40  32  26  45  29  43  36  26  30  37  13  18  9   26  29  26  53  10  49  20  16  15  -21  24  24  31  52  37  37  23  28  31  50  27  10  24  27  41  55  34  25
L1_33B           39  32  26  46  26  44  35  27  29  20  18  22  18  26  27  28  50  6   55  26  9   29  -26  23  26  34  50  36  35  24  33  34  49  31  12  23  30  41  60  28  27
L1_65B           41  34  27  44  30  44  37  27  20  30  19  11  20  27  35  31  52  21  59  25  19  33  -25  25  26  34  46  36  40  25  32  32  48  31  11  25  30  43  60  39  34
L2_7B            38  33  27  43  29  42  34  28  30  24  16  15  30  12  35  25  43  18  38  16  12  29  -13  28  25  29  50  36  37  21  34  32  50  28  19  26  32  44  51  30  25
L2_13B           42  31  28  45  32  44  29  33  35  33  19  14  35  23  29  23  57  20  52  22  12  29  -17  24  25  35  50  41  36  24  39  35  48  31  18  27  34  46  66  35  28
L2_34B           40  34  28  42  25  45  31  24  32  34  28  12  16  18  36  35  52  10  54  28  11  30  -19  27  24  33  56  41  36  26  32  36  53  33  7   26  30  45  56  26  35
L2_70B           42  34  28  52  28  44  42  29  34  37  20  16  21  17  35  30  60  18  67  26  12  30  -10  31  29  35  51  41  45  27  34  40  52  36  12  28  31  45  65  33  20
ChatGPT          18  16  15  19  55  65  19  16  21  17  17  15  22  5   24  31  35  9   42  19  9   23  6    65  62  64  84  77  75  53  71  73  75  73  54  55  69  71  82  57  57
MPT-instr_7B     38  32  29  32  31  38  35  29  33  41  14  13  29  12  34  35  53  28  56  27  2   32  -12  22  19  28  44  27  26  19  28  30  46  24  5   20  39  33  48  20  19
Falcon-instr_7B  40  34  30  36  32  36  34  26  30  33  29  11  21  21  28  34  23  31  45  23  22  29  -27  36  31  48  62  48  45  31  47  40  57  43  19  30  56  47  63  49  48
L2-Chat_7B       55  43  40  49  48  56  55  50  48  45  62  28  51  29  44  59  75  28  75  55  26  50  -19  44  42  45  71  54  54  33  54  53  55  62  29  36  58  53  61  36  37
L2-Chat_13B      51  40  38  49  46  53  40  50  71  40  62  35  49  45  49  49  72  30  67  54  36  50  16   37  37  41  52  44  45  29  46  49  50  48  29  31  58  41  58  33  40
L2-Chat_34B      46  40  35  39  44  47  44  54  63  53  53  30  51  36  48  56  76  28  75  53  34  54  2    40  37  43  59  54  49  32  48  50  58  53  25  34  60  50  63  44  40
L2-Chat_70B      51  43  40  49  44  49  47  52  50  55  50  34  56  28  56  64  78  27  76  55  34  57  -1   47  43  49  67  60  55  38  54  56  61  58  28  39  67  56  70  43  47
""")


# Table 4: closed models, quoted by the paper from their own reports.
TABLE_4 = _parse("""
model  mmlu  triviaqa@1  nq_open@1  gsm8k  humaneval  bbh
GPT-3.5     70.0  -     -     57.1  48.1  -
GPT-4       86.4  -     -     92.0  67.0  -
PaLM_540B   69.3  81.4  29.3  56.5  26.2  52.3
PaLM-2-L    78.3  86.1  37.5  80.7  -     65.7
L2_70B      68.9  85.0  33.0  56.8  29.9  51.2
""")


# Tables 16 and 17: two 7B models after 150B tokens, with contexts of 2k and of 4k; QMSum is ROUGE-1 where no metric stands.
TABLES_16_17 = _parse("""
model  narrative_qa  qasper  quality  qmsum  qmsum/rouge2  qmsum/rougeL  contract_nli  squad  squad/f1  hellaswag  nq_open@64  triviaqa@64  gsm8k  humaneval
2k_context  0.21   0.71   26.1  0.13   0.01  0.12   11.76  57.23  62.89  75.1  25.5  53.7  4.9  7.9
4k_context  17.26  18.52  29.6  15.08  3.55  12.16  16.33  57.99  64.46  74.8  25.5  52.2  6.5  7.3
""")

# Table 18: three 30B models after 150B tokens; 0 shots but for MMLU (5) and GSM8K (8).
TABLE_18 = _parse("""
model  boolq  piqa  siqa  hellaswag  arc_easy  arc_challenge  nq_open@0  triviaqa@0  mmlu  gsm8k  humaneval
MHA  71.0  79.3  48.2  75.1  71.2  43.0  12.4  44.7  28.0  4.9  7.9
MQA  70.6  79.0  47.9  74.5  71.6  41.9  14.5  42.8  26.5  4.8  7.3
GQA  69.4  78.8  48.6  75.4  72.1  42.5  14.0  46.2  26.9  5.3  7.9
""")

# Table 15: word problems; Toolformer and Llama 2-Chat (of what size is not said) call a calculator, the others have none.
TABLE_15 = _parse("""
model  asdiv  svamp  mawps
OPT-66B       6.0   4.9   7.9
GPT-J         7.5   5.2   9.9
GPT-J+CC      9.6   5.0   9.3
GPT-3         14.0  10.0  19.8
Toolformer    40.4  29.4  44.0
Llama_2-Chat  67.1  69.2  82.4
""")

# Figs. 1 (as printed) and 12 (read off the plot): people's comparisons, over all prompts and by turns.
FIGURES_1_12 = _parse("""
comparison  win  tie  loss  single_turn_win  single_turn_tie  single_turn_loss  multi_turn_win  multi_turn_tie  multi_turn_loss
L2-Chat_7B_against_MPT-7b-chat          61.1  20.9  18.0  62  19  20  60  24  16
L2-Chat_13B_against_Vicuna-13b          45.4  29.8  24.9  44  28  28  47  33  20
L2-Chat_34B_against_Vicuna-33b          37.2  31.6  31.2  36  30  34  39  33  29
L2-Chat_34B_against_Falcon-40b-instruct 76.3  14.6  9.1   83  10  7   63  23  14
L2-Chat_70B_against_PaLM-Bison          53.0  24.6  22.4  52  24  24  54  25  20
L2-Chat_70B_against_ChatGPT             35.9  31.5  32.5  36  31  33  36  32  32
""")

# Fig. 30 (read off the plot): L2-Chat 70B against ChatGPT by category.
FIGURE_30 = _parse("""
category  win  tie  loss
dialogue             37.5  31    31
writing              30    31    39
facts                40    32.5  27.5
language_help        33.5  25.5  41.5
recommendations      35    40    25
""")

# Figs. 3 and 17 (violations, mean rating), of which 34B and Falcon are printed, and 18 (by turns); else read off the plots.
FIGURES_3_17_18 = _parse("""
model  violations_%  mean_rating  single_turn_%  multi_turn_%
L2-Chat_7B           3     4.58  2     6.5
L2-Chat_13B          3     4.56  2.5   4.5
L2-Chat_34B          7     4.45  3.5   14.5
L2-Chat_70B          4     4.58  2     8.5
MPT-7b-chat          20.5  3.80  13.5  36
Vicuna-13b           25    3.70  18    41.5
Vicuna-33b           38    3.40  32    50
Falcon-40b-instruct  7.5   3.88  0.3   24.5
PaLM-Bison           28.5  3.62  23    41
ChatGPT              7     4.20  3.5   14.5
""")

# What sections 3.4.2 and 4.4 say beside these figures.
HUMAN_NOTES = {
    "comparisons": (
        "The paper's numbers: Fig. 1 as printed; Figs. 12 and 30 read off their plots. Over 4,000 prompts with three raters "
        "each, intervals of 1 to 2 points; Gwet's AC2 is 0.37 to 0.55, low where models are close (70B against ChatGPT), high "
        "where they are not (34B against Falcon). Without a system prompt for ChatGPT, 70B wins 44 % in place of 36 % "
        "(Fig. 30); by turns and words there is no trend (Fig. 31)."
    ),
    "safety": (
        "The paper's numbers: Figs. 3, 17 and 18 read off their plots (34B and Falcon over all prompts: as printed). 1,974 "
        "prompts, majority of three raters; agreement of 0.70 to 0.95 by batch, on Llama 2-Chat a mean AC2 of 0.92. Of the "
        "risks, unqualified advice is Llama 2-Chat's weakest: 6.5, 8.5, 11.5 and 7 % of 7B, 13B, 34B and 70B (Fig. 19)."
    ),
}

# Table 3 prints Math of L2 7B and 13B as their GSM8K scores alone; the other ten rows are means of GSM8K and MATH.
MATH_NOTE = (
    "Math is the mean of GSM8K and MATH. The paper's cells for Llama 2 7B (14.6) and 13B (28.7) are their GSM8K scores alone; "
    "the means are 8.55 and 16.3, which stand here."
)


def cell(columns: Mapping[str, float], task: str, *, metric: str | None, shots: int | None) -> float | None:
    """A model's number for a task, a family or a part of one, run with so many examples by this metric; None if it has none."""
    name = plain(task)
    family = "mmlu" if name.startswith("mmlu_") else family_of(name)
    own_shots, own_metrics = SHOTS_AND_METRICS.get(family, ((shots,), (metric,)))
    if name == "math":
        name = "math_set"
    if shots is not None and shots not in own_shots:
        name += f"@{shots}"
    if metric not in own_metrics:
        name += f"/{metric}"
    return columns.get(name)


def published(model: str) -> Mapping[str, float]:
    """All columns of a model of the paper; of Math the true mean (see MATH_NOTE)."""
    tables = (
        TABLE_4, TABLE_3, TABLES_16_17, TABLE_18, TABLES_19_20_25, TABLES_21_22_23, TABLE_24, TABLES_44_45, TABLES_46_50,
    )  # fmt: skip
    found: dict[str, float] = {}
    for table in tables:
        found |= table.get(model, {})
    if not found:
        names = dict.fromkeys(name for table in tables for name in table)
        raise ValueError(f"{model!r} is no model of the paper's tables; expected one of {', '.join(names)}")
    if model in TABLES_19_20_25:
        # One name, two columns: Table 25 has the set MATH, Table 3 the group.
        mathematics = TABLES_19_20_25[model]
        found |= {"math": (mathematics["gsm8k"] + mathematics["math"]) / 2, "math_set": mathematics["math"]}
    return found
