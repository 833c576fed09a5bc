#!/bin/sh
# Runs a compiler for Jittor: compile_operator.sh PYTHON SCRIPT ARGUMENTS. Where SCRIPT is asm_tuner.py, with arguments
# --cc_path="g++" source flags..., which would start a Python that compiles in steps, the compiler is run at once.
python=$1
shift
case $1 in
*asm_tuner.py)
    compiler=${2#--cc_path=}
    shift 2
    exec "$compiler" "$@"
    ;;
*)
    exec "$python" "$@"
    ;;
esac
