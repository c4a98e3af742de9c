"""Where the benchmarks' data come from: the text of ``python -m evals data``."""

WHERE = """\
Put these files into one folder and pass it as --data DIR. Nothing is downloaded for you.

RULER, needle heat map
  PaulGrahamEssays.json      HKUNLP/STRING, niah/data/PaulGrahamEssays.json (one object {"text": ...}), or built by
                             NVIDIA/RULER scripts/data/synthetic/json/download_paulgraham_essay.py. Prompts are
                             comparable only between runs on the same file: its hash goes into config.json.
  dev-v2.0.json              SQuAD 2.0 dev (qa_1): rajpurkar/SQuAD-explorer, dataset/dev-v2.0.json  (CC BY-SA 4.0)
  hotpot_dev_distractor_v1.json   HotpotQA dev, distractor setting (qa_2): hotpotqa.github.io  (CC BY-SA 4.0)
  english_words.json         only common words (cwe) of the main branch at 128K and more: NVIDIA/RULER,
                             scripts/data/synthetic/json/english_words.json (Git LFS)
  punkt_tab                  only with --splitter english (published essay prompts): python -m nltk.downloader punkt_tab

InfiniteBench
  <task>.jsonl               twelve files of the Hub dataset xinrongzhang2022/InfiniteBench, e.g.
                             hf download xinrongzhang2022/InfiniteBench --repo-type dataset --local-dir DIR
                             (without --data the records are streamed from the Hub through `datasets`)

Perplexity
  --text FILE[,FILE...]      plain text; the published figures use the Hub dataset liyucheng/pg19-4k (field "text")

Latency
  --text FILE                plain text; MInference repeats prompt_hardest.txt of FranxYao/chain-of-thought-hub

Without any of these: RULER runs niah_single_1, niah_multikey_2, niah_multikey_3, vt, cwe, fwe and passkey; needle,
perplexity and latency run on a packaged public-domain novel."""
