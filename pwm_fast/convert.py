"""python -m pwm_fast.convert SRC DST: other programs' episodes and world models into ours, and our models into theirs.

    chunk_0.pt, a folder of chunks      TD-MPC2's data              -> episode store
    ep_data_HopperEnv.pt                PWM's data                  -> episode store
    episodes.npz, minari:NAME           see npz_files, minari_files -> episode store
    mt30-48M.pt                         TD-MPC2's or PWM's model    -> world_model.safetensors and .json
    world_model.safetensors             our model                   -> TD-MPC2's checkpoint and .json

Nothing in a file is ever executed. Converting episodes needs the memory of one of them; it can be stopped or killed at
any moment and goes on with --resume.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pwm_fast.data.conversion import convert_episodes, episode_sources
from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.task_table import action_dims
from pwm_fast.data.torch_files import is_torch_file, open_torch_file
from pwm_fast.errors import Interrupted, positive, run_command
from pwm_fast.models.tdmpc2_checkpoints import find_checkpoint, load_checkpoint
from pwm_fast.models.tdmpc2_export import export_checkpoint
from pwm_fast.models.world_model import WorldModel
from pwm_fast.progress import make_console, number_text
from pwm_fast.state_files import write_json

MODEL_SUFFIX = ".safetensors"
CHECKPOINT_SUFFIXES = (".pt", ".pth")


@dataclass
class Options:
    """Convert episodes and world models of TD-MPC2, PWM, Minari and npz files; export world models to TD-MPC2."""

    source: Annotated[str, tyro.conf.Positional]
    """File, folder of files, or minari:NAME."""
    destination: Annotated[Path, tyro.conf.Positional]
    """Folder of the new store, or the model file to write."""
    tasks: list[str] | None = None
    """Episodes of these tasks only: names, mt30, mt80, dm_control, metaworld (default: all)."""
    task: str | None = None
    """Name of the one task of a PWM, npz or Minari source (default: as the file is named)."""
    resume: bool = False
    """Go on with the conversion of episodes in DST."""
    check: bool = True
    """Compare the checksums in .pt files; --no-check spares a reading, or takes files written without them."""
    reward: Literal["symexp", "linear"] | None = None
    """How a checkpoint's reward head is read (default: as TD-MPC2 and PWM do, symexp and linear)."""
    num_q: int = 5
    """Q functions of an exported checkpoint (TD-MPC2's setting num_q)."""
    tensordict: Literal["0.8", "0.14"] = "0.8"
    """Version of tensordict under which an exported checkpoint will be loaded; TD-MPC2 pins 0.8."""


def main(options: Options) -> int:
    positive("num_q", options.num_q)
    console, source = make_console(), Path(options.source)
    if source.suffix == MODEL_SUFFIX and not is_torch_file(source):
        export_model(options, source, console)
    elif not is_torch_file(source) or source.suffix == ".npz":
        import_episodes(options, console)
    else:
        tree = open_torch_file(source, options.check)
        if find_checkpoint(tree, source) is None:
            import_episodes(options, console)
        else:
            import_model(options, source, tree, console)
    return 0


def import_episodes(options: Options, console: Console) -> None:
    """Write or continue the store, then show what is in it."""
    openers = episode_sources(options.source, options.task, options.check)
    command = shlex.join(["python", "-m", "pwm_fast.convert", *sys.argv[1:]])
    try:
        account = convert_episodes(
            openers,
            options.destination,
            tasks=options.tasks,
            resume=options.resume,
            notes={"command": command},
            console=console,
        )
    except Interrupted as stop:
        again = command if options.resume else f"{command} --resume"
        raise Interrupted(f"{stop}; resume with: {again}", stop.code) from None
    store = EpisodeStore.open(options.destination)
    counts = f"{store.num_episodes:,} episodes, {store.num_transitions:,} transitions"
    console.print(Text(f"{options.destination}: {counts}"), soft_wrap=True)
    table = Table()
    table.add_column("task")
    for heading in ("episodes", "transitions", "return: mean", "best"):
        table.add_column(heading, justify="right")
    for name, row in account["by_task"].items():
        returns = (row["return_sum"] / row["episodes"], row["return_best"])
        table.add_row(name, f"{row['episodes']:,}", f"{row['transitions']:,}", *map(number_text, returns))
    console.print(table)
    if account["left_out"]:
        console.print(Text(f"left out: {account['left_out']:,} episodes with NaN or infinite numbers"))


def import_model(options: Options, source: Path, tree: Any, console: Console) -> None:
    """A checkpoint as our safetensors file, with a JSON file beside it."""
    destination = free_destination(options.destination, (MODEL_SUFFIX,))
    model = load_checkpoint(source, options.reward, options.check, tree)
    model.save(destination)
    description = {"config": asdict(model.config), "provenance": model.provenance}
    write_json(description_file(destination), description)
    c, size = model.config, model.provenance["size"]
    layout = model.provenance["source"]["layout"]
    console.print(Text(f"{source}: {layout} checkpoint, {size or 'of no published size'}, "
                       f"{model.num_parameters / 1e6:.2f}M parameters"), soft_wrap=True)  # fmt: skip
    console.print(Text(f"{c.obs_dim} observations, {c.action_dim} actions, {c.num_tasks or 'no'} tasks, latent "
                       f"{c.latent_dim}, rewards read as {model.provenance['reward']}"))  # fmt: skip
    console.print(Text(f"world model: {destination}"), soft_wrap=True)


def export_model(options: Options, source: Path, console: Console) -> None:
    """Our model as TD-MPC2's checkpoint, with the settings under which it loads in a JSON file beside it."""
    destination = free_destination(options.destination, CHECKPOINT_SUFFIXES)
    model = WorldModel.load(source)
    result = export_checkpoint(
        model,
        destination,
        action_dims=action_dims(model.config.num_tasks),
        num_q=options.num_q,
        tensordict=options.tensordict,
    )
    write_json(description_file(destination), {**result, "provenance": model.provenance})
    for note in result["notes"]:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    settings = description_file(destination)
    console.print(Text(f"TD-MPC2 checkpoint: {destination} (its settings: {settings})"), soft_wrap=True)


def description_file(path: Path) -> Path:
    """The JSON file beside a model: world_model.json, or mt30.pt.json for a checkpoint, so that both fit one folder."""
    return path.with_suffix(".json") if path.suffix == MODEL_SUFFIX else path.with_name(f"{path.name}.json")


def free_destination(path: Path, suffixes: tuple[str, ...]) -> Path:
    """`path`, if it has one of the suffixes and neither it nor its JSON file exists; ValueError or FileExistsError."""
    if path.suffix not in suffixes:
        raise ValueError(f"DST must end in {' or '.join(suffixes)} for a world model, got {path}")
    for file in (path, description_file(path)):
        if file.exists():
            raise FileExistsError(f"{file} exists already; remove it, or choose another DST")
    return path


if __name__ == "__main__":
    sys.exit(run_command(Options, main, "pwm_fast.convert"))
