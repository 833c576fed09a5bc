#!/bin/sh
# Stands in for Python where Jittor calls its asm_tuner.py, which starts a Python for every operator to run the compiler
# twice: runs the compiler once. asm_tuner.py --cc_path="g++" source flags...
shift
compiler=${1#--cc_path=}
shift
exec "$compiler" "$@"
