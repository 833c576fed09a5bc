#!/bin/sh
# Runs a compiler for Jittor: compile_operator.sh SCRIPT ARGUMENTS, in place of Python. Where SCRIPT is asm_tuner.py, with
# arguments --cc_path="g++" source flags..., which would compile in steps, the compiler is run at once. What it writes is
# named when it is whole: a process that is killed on the way leaves no half of a library, which Jittor would load.
case $1 in
*asm_tuner.py)
    compiler=${2#--cc_path=}
    shift 2
    for word in "$@"; do
        shift
        if [ "$before" = -o ]; then
            target=$word
            word=$word.$$
        fi
        before=$word
        set -- "$@" "$word"
    done
    "$compiler" "$@" && mv -f "$target.$$" "$target"
    ;;
*)
    exec "$OVERLOCK_PYTHON" "$@"
    ;;
esac
