#!/bin/bash
# Every evaluation of trained networks; each script says what it measures:
#     bash tests/results/battery.sh runs/*-*-*
# If it is stopped, the same command continues. A script that fails does not keep the others from
# running; the exit status is then 1.

methods=$(dirname "$0")/../../methods
images=()
films=()
large=()  # networks for the scenes at their usual size
small=()
for run in "$@"; do
    case $(basename "$run") in
        *-movers-* | *-tripod-* | *-bunny-*) films+=("$run") ;;
        mae-*) images+=("$run") small+=("$run") ;;  # a vision transformer, slow on large images
        *) images+=("$run") large+=("$run") ;;
    esac
done

status=0
evaluate() {  # name of the script, runs and flags
    python "$methods/eval_$1.py" "${@:2}" || status=1
}

if [ ${#images[@]} -gt 0 ]; then
    for script in features few layers finetune geometry robustness; do
        evaluate $script "${images[@]}"
    done
    evaluate features "${images[@]}" --data fashion
fi
for script in dense detection; do
    if [ ${#large[@]} -gt 0 ]; then
        evaluate $script "${large[@]}"
    fi
    if [ ${#small[@]} -gt 0 ]; then
        evaluate $script "${small[@]}" --size 48
    fi
done
if [ ${#films[@]} -gt 0 ]; then
    evaluate video "${films[@]}"
    evaluate features "${films[@]}" --data emoji
    evaluate features "${films[@]}" --data fashion
fi
exit $status
