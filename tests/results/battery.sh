#!/bin/bash
# Every evaluation of trained networks; each script says what it measures:
#     bash tests/results/battery.sh runs/*-*-*
# If it is stopped, the same command continues. A script that fails does not keep the others from
# running; the exit status is then 1.

if [ ! -e "$1" ]; then
    echo "give the folders of finished runs: bash tests/results/battery.sh runs/*-*-*" >&2
    exit 2
fi

methods=$(dirname "$0")/../../methods
images=()
films=()
small=()  # networks that see the scenes at 48 pixels: mae's, which is slow on large images
large=()  # those that see them at the usual size
for run in "$@"; do
    case $(basename "$run") in
        *-movers-* | *-tripod-* | *-bunny-*) films+=("$run") ;;
        mae-*) images+=("$run") small+=("$run") ;;
        *) images+=("$run") large+=("$run") ;;
    esac
done

status=0
evaluate() {  # name of the script, runs and flags
    python "$methods/eval_$1.py" "${@:2}" || status=1
}

# Of two calls of a script the second draws the pictures that stay: the more usual one.
if [ ${#films[@]} -gt 0 ]; then
    evaluate video "${films[@]}"
    evaluate features "${films[@]}" --data fashion
    evaluate features "${films[@]}" --data emoji
fi
if [ ${#images[@]} -gt 0 ]; then
    evaluate features "${images[@]}" --data fashion
    for script in features few layers finetune geometry robustness; do
        evaluate "$script" "${images[@]}"
    done
fi
for script in dense detection; do
    if [ ${#small[@]} -gt 0 ]; then
        evaluate "$script" "${small[@]}" --size 48
    fi
    if [ ${#large[@]} -gt 0 ]; then
        evaluate "$script" "${large[@]}"
    fi
done
exit $status
