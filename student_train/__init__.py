"""Phase two: students from a store, or plainly."""

import time

BEGUN_S = time.perf_counter()  # before anything heavy is imported: a command's account of its time begins here
