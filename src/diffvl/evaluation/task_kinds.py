"""What kind of answers each task of lmms-eval asks for, as its files say it: known before a checkpoint or any data is loaded.

Place in the flow: before a run of benchmarks, so that a task that cannot be answered ends none of the hours before it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffvl.errors import UsageError, first_few, first_line
from diffvl.evaluation.likelihood import ONLY_A_BOUND

GIVEN_CHOICES = {"loglikelihood", "multiple_choice"}  # lmms-eval runs them through its simple interface only
ANSWERED = {"generate_until", "generate_until_agentic", *GIVEN_CHOICES}
REFUSED = {
    "generate_visual_cot": "has to draw an image before it answers, which diffvl does not",
    "generate_until_multi_round": "asks in several rounds, which diffvl does not answer",
}
USUAL = "generate_until"  # what lmms-eval takes where a file says nothing
NUM_SHOWN = 3  # tasks of a group

Kinds = dict[str, str]  # task -> its `output_type`


def require_known(tasks: Sequence[str], manager: Any, include_path: Path | None) -> None:
    """Raises UsageError for names that lmms-eval does not have."""
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path: {include_path} is no folder; expected one with YAML files of tasks")
    if absent := [name for name in tasks if name not in manager.all_tasks]:
        raise UsageError(
            f"--tasks: lmms-eval has no task {', '.join(absent)}; `python -m lmms_eval --tasks list` lists what it has, and "
            "--include-path names a folder with tasks of your own"
        )


def kinds_of(name: str, manager: Any) -> Kinds:
    """The kinds of a task, or of all tasks of a group or tag.

    Raises:
        UsageError: if the code beside a task's file needs something that is not here: a package, a variable.
    """
    try:
        return _kinds(name, manager, None)
    except ModuleNotFoundError as error:
        raise needs_package(name, error) from error
    except Exception as error:  # the task's own code is imported, which may raise anything
        told = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"task {name}: its own code cannot be loaded here ({told})") from error


def needs_package(task: str, error: ModuleNotFoundError) -> UsageError:
    """The message for a task whose code imports what is not here."""
    return UsageError(f"task {task} needs the package {error.name}, which is not installed here: install it")


def _kinds(member: str | Mapping[str, Any], manager: Any, above: str | None) -> Kinds:
    """As lmms-eval resolves a name, or what stands in a group's list: what a group says holds against what its tasks say.

    Args:
        above: the kind that a group around it names.
    """
    said: Mapping[str, Any] = {} if isinstance(member, str) else member
    name = member if isinstance(member, str) else member["task"]
    kind = above or said.get("output_type")
    if isinstance(name, list):
        return {task: found for one in name for task, found in _kinds(one, manager, kind).items()}
    if manager._name_is_group(name) or manager._name_is_tag(name):
        listed = manager._get_tasklist(name)
        group = manager._get_config(name) if listed == -1 else {"task": listed}
        members = group.get("task", [])
        return _kinds({"task": [members] if isinstance(members, str) else members}, manager, kind or group.get("output_type"))
    own = manager._get_config(name) if name in manager.all_tasks else {}
    written_in = own.get("class") or said.get("class")
    return {name: str(kind or own.get("output_type") or getattr(written_in, "OUTPUT_TYPE", None) or USUAL)}


def refuse_unanswerable(kinds: Mapping[str, Kinds], is_exact: bool) -> None:
    """Raises UsageError with all tasks that cannot be answered.

    Args:
        kinds: of each name that was asked for.
        is_exact: whether there are likelihoods of given answers.
    """
    problems: list[str] = []
    for name, found in kinds.items():
        why: dict[str, list[str]] = {}
        for task, kind in found.items():
            if kind not in ANSWERED:
                reason = REFUSED.get(kind, "asks for something that diffvl does not know")
                why.setdefault(f"{reason} (output_type {kind})", []).append(task)
            elif kind in GIVEN_CHOICES and not is_exact:
                why.setdefault(ONLY_A_BOUND, []).append(task)
        for reason, tasks in why.items():
            which = "" if tasks == [name] else f" ({', '.join(first_few(tasks, NUM_SHOWN))})"
            problems.append(f"task {name}{which} {reason}")
    if problems:
        raise UsageError("--tasks: " + "\n  ".join(["not all of them can be answered; none was", *problems]))
