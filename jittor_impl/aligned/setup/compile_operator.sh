#!/bin/sh
# Runs a compiler for Jittor: compile_operator.sh SCRIPT ARGUMENTS, in place of Python. Where SCRIPT is asm_tuner.py, with
# arguments --cc_path="g++" source flags..., which would compile in steps, the compiler is run at once.
case $1 in
*asm_tuner.py)
    compiler=${2#--cc_path=}
    shift 2
    exec "$compiler" "$@"
    ;;
*)
    exec "$OVERLOCK_PYTHON" "$@"
    ;;
esac
