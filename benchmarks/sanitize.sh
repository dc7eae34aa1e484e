#!/usr/bin/env bash
# The compiled CPU form under AddressSanitizer and UndefinedBehaviorSanitizer, on random calls (benchmarks/fuzz.py):
#
#     benchmarks/sanitize.sh --cases 300
#     HF_POLYATTN_CPU=avx2 benchmarks/sanitize.sh --cases 300 --out benchmarks/results/fuzz_sanitized.csv
#
# The first read or write outside of a tensor or buffer, or undefined operation, stops it with a report. Needs g++ with
# its sanitizer libraries; PYTHON names the interpreter. Builds once, into a cache of its own: two
# or three minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-python}" PYTHONPATH="$PWD:$PWD/benchmarks"
export HF_POLYATTN_CACHE="${HF_POLYATTN_CACHE:-${TMPDIR:-/tmp}/hf_polyattn_sanitized}"
SANITIZERS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1 -w"
WITH_FLAGS="import os, sys; from hf_polyattn.ops import cpu; cpu.FLAGS += '$SANITIZERS'.split()"

# the compiler runs outside of the sanitizers, and the build lies where the package looks for it
"$PYTHON" -c "$WITH_FLAGS
import subprocess, torch
from torch.utils.cpp_extension import include_paths, library_paths
name = os.environ.get('HF_POLYATTN_CPU') or cpu.instruction_set()
library = cpu._library(name)
if not library.exists():
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = [*cpu.FLAGS, *cpu.INSTRUCTION_SETS[name], *('-I' + path for path in include_paths())]
    flags += [f'-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}', '-fPIC', '-shared']
    links = [*('-L' + path for path in library_paths()), '-lc10', '-ltorch_cpu']
    subprocess.run(['g++', *flags, str(cpu.SOURCE), '-o', f'{library}.part', *links], check=True)
    os.replace(f'{library}.part', library)
"
# Python is not instrumented: the libraries must be there first, and what it never frees is no finding
libraries="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so.6)"
exec env LD_PRELOAD="$libraries" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 "$PYTHON" -c "$WITH_FLAGS
if problem := cpu.build().problem:
    sys.exit(f'the sanitized build was not loaded: {problem}')
import fuzz
sys.argv[0] = 'benchmarks/sanitize.sh'
fuzz.main()
" --forms cpu "$@"
