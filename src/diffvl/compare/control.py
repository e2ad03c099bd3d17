"""`diffvl convert --control`: the conversion, its AR control beside it, and one page about both."""

from pathlib import Path

from diffvl.compare.compare import Compared, CompareRequest, compare
from diffvl.compare.page import write_page
from diffvl.compare.settings import NEW_TOKENS
from diffvl.conversion.control import CONTROL
from diffvl.conversion.plan import COMPARED, ConvertRequest
from diffvl.conversion.run import convert
from diffvl.terminal import console as terminal
from diffvl.terminal.console import say
from diffvl.train.launch import process_state


def convert_with_control(request: ConvertRequest) -> tuple[Path, Compared | None]:
    """Converts, trains the control, and compares them on what both have held out; the page lies beside their directories.

    Returns:
        the directory of the conversion; and the comparison, in the main process, unless nothing was to be run, or a page of an
        earlier run is there.
    Raises:
        DiffvlError: on any mistake of the user; what was finished stays, and `resume` goes on from it.
    """
    directory = convert(request)
    if request.dry_run or not process_state().is_main_process:
        return directory, None
    page, console = directory.parent / COMPARED, terminal.console(stderr=True)
    if request.resume and page.is_file():
        say(console, ("compare", "bold"), f": finished already, kept: {page}")
        return directory, None
    runs = (str(directory.parent / CONTROL), str(directory))
    compared = compare(CompareRequest(runs, speed=request.speed, max_new_tokens=NEW_TOKENS), console)
    write_page(compared, page)
    return directory, compared
