"""Slurm's commands as far as a submission needs them: `sbatch` keeps the scripts in jobs/, `squeue` says what stands in queue."""

from pathlib import Path

COMMANDS = {
    "sbatch": """mkdir -p "$here/jobs"; number=$(($(ls "$here/jobs" | wc -l) + 1))
for script; do :; done
{ echo "#!/bin/bash"; echo "# $*"; cat "$script"; } > "$here/jobs/$number"; echo "Submitted batch job $number\"""",
    "squeue": """cat "$here/queue" 2>/dev/null || true""",
    "srun": """shift 3; exec "$@\"""",  # -l -n 1 command
    "scontrol": "echo localhost",
}


def write(folder: Path) -> Path:
    """Writes the commands into a folder, for PATH."""
    folder.mkdir()
    for name, body in COMMANDS.items():
        (folder / name).write_text(f'#!/bin/sh\nhere=$(dirname "$0")\n{body}\n')
        (folder / name).chmod(0o755)
    return folder
