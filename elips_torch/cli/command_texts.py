"""What ``build``, ``search``, ``tune`` and ``evaluate`` say about themselves."""

# For the list of commands.
SUMMARIES = {
    "build": "make an index file from a file of vectors",
    "search": "find the neighbours of the queries in a file",
    "tune": "find the cheapest search parameters that reach a recall",
    "evaluate": "measure how many relevant ids an index finds",
}
DESCRIPTIONS = {
    "build": "Make an index file from a file of vectors. The file is read a part at a time: what must fit "
    "into memory is the index, and a sample of vectors where the index learns from one.",
    "search": "Find the nearest vectors of each query in a file, and write their ids and scores.",
    "tune": "Find the cheapest search parameters that reach a recall against exact search; print everything "
    "that was tried. Ends with 1 where no parameters reach it.",
    "evaluate": "Search, and measure how many of the relevant ids are found, and how high: accuracy (any "
    "hit), recall, precision, NDCG, MAP and MRR at several k, and R-precision, by the definitions of "
    "trec_eval: map@k divides by R, the number of relevant ids, also where that is more than k "
    "(sentence-transformers: by the smaller of both). Queries without a relevant id do not count.",
}
EXAMPLES = {
    "build": """examples:
  elips-torch build --vectors docs.npy --output docs.safetensors
      whatever index suits so many vectors
  elips-torch build --vectors docs.parquet:embedding --ids docs.parquet:id --factory IVF1024,SQ8
      --metric cosine --options.nprobe 16 --output docs.safetensors
      by a description; vectors and their ids are columns of a table
  elips-torch build --vectors base.fvecs --index IVFFlatIndex --index.nlist 1024 --output base.faiss
      by class and its keywords, which --index.help IVFFlatIndex lists; a file that faiss reads
  elips-torch build --config configs/build_ivf.yaml --vectors docs.npy --output docs.safetensors
      settings from a file
""",
    "search": """examples:
  elips-torch search --index docs.safetensors --queries queries.npy --k 10 --output found.jsonl
      a line such as {"query": 0, "ids": [31, 7], "scores": [0.12, 0.4]} for each query
  elips-torch search --index docs.safetensors --queries q.parquet:embedding --parameters.nprobe 32
      --output found.parquet
      columns query, ids and scores; 32 lists are read
  elips-torch search --config configs/search.yaml --queries queries.npy
      settings from a file
""",
    "tune": """examples:
  elips-torch tune --index docs.safetensors --queries queries.npy --target-recall 0.95
      prints the curve and the best parameters
  elips-torch tune --index docs.safetensors --queries queries.npy --database docs.npy --json curve.json
      --png curve.png --output tuned.safetensors
      recall of the vectors themselves rather than their codes; an index that searches with what was found
  elips-torch tune --index base.faiss --queries query.fvecs --ground-truth groundtruth.ivecs
      files of a benchmark
  elips-torch tune --config configs/tune.yaml --queries queries.npy
      settings from a file
""",
    "evaluate": """examples:
  elips-torch evaluate --index docs.safetensors --queries data.safetensors:queries
      --relevant data.safetensors:relevant
      prints a table
  elips-torch evaluate --index docs.safetensors --queries q.parquet:embedding --relevant q.parquet:positives
      --k 1 10 --json scores.json --name cosine
      also writes {"cosine_accuracy@1": ..., "cosine_ndcg@10": ...}, keys of sentence-transformers' evaluators
  elips-torch evaluate --config configs/evaluate.yaml --queries queries.npy --relevant relevant.npy
      settings from a file
""",
}
SOURCES = """files:
  .npy, .fvecs, .bvecs and .ivecs hold one array and are written FILE. In .safetensors a tensor and in
  .parquet, .arrow and .feather a column is written FILE:NAME; the name may be left out where only one can
  be meant. Whole numbers are read as float32 where vectors are wanted. Parquet and arrow need pyarrow:
  pip install "elips-torch[arrow]"
"""
INDEXES = (
    "instead of a description: class of the index, whose keywords are --index.NAME, or in a YAML class_path "
    "and init_args. Its dim is that of the vectors."
)
