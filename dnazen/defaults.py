"""Defaults that the functions use and the commands show in their help; imports nothing, for help must come at once."""

# of a corpus
MAX_TOKENS = 510  # of a sequence
MIN_LENGTH = 64  # bases of a piece
VALIDATION_FRACTION = 0.01

# of the extraction of G-grams
MIN_PMI = 2.0  # bits
MIN_COUNT = 5
MIN_PAIR_COUNT = 5
MIN_LEN, MAX_LEN = 2, 5  # tokens of a G-gram
LONG_PIECES = "drop"
NUM_WORKERS = 1
DEVICE = "cpu"
SHUFFLES = 199  # of G-grams' bases, for motifs

# of the use of a model
WINDOW_BASES = 2040  # what 510 tokens of a corpus take up, at 4 bases a token
STRIDE_BASES = WINDOW_BASES // 2
MAX_BATCH_TOKENS = 8192
POOLING = "mean"
PRECISIONS = ("fp32", "bf16")
PRECISION = "fp32"
FLANK_BASES = 256
MAX_VARIANT_TOKENS = 4096  # of a batch: the scores of so many tokens at every masked one are kept for some batches

# of measurements
MODEL_SIZE = "tiny"
BENCH_SECONDS = 30.0
GUE_SEEDS = 3
GUE_LEARNING_RATE = 3e-5
