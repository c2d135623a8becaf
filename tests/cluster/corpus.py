"""Values that a shell, or a careless program, would not hand on as they are."""

VALUES = {
    "SPACES": "  two  words ",
    "QUOTES": """it's "quoted" `twice`""",
    "EXPANDED": "$HOME ${PATH} $$ $0 !! ~ %h %n %% %j",
    "RUN": "$(touch pwned) `touch pwned`; touch pwned & touch pwned | touch pwned > pwned",
    "LIST": "eth0,ib0;a=b,,=;x",
    "PATTERN": "* ? [a-z] {1,2}",
    "BACKSLASHES": r"\ \\ \n \" \'",
    "NEWLINES": "first\nsecond\r\n\n#SBATCH --hold\nlast",
    "TABS": "\ta\t",
    "UNICODE": "Größe ✓ 日本語 \N{NO-BREAK SPACE}",
    "EMPTY": "",
    "DASHES": "--help -x",
    "LONG": "x" * 20_000,
}

#: What a rank runs to say what came to it: `python -c REPORT FOLDER WORD...`.
REPORT = """
import json, os, socket, sys, pathlib
rank = next(os.environ[n] for n in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID") if n in os.environ)
seen = {"host": socket.gethostname(), "words": sys.argv[2:], "env": dict(os.environ)}
pathlib.Path(sys.argv[1], rank + ".json").write_text(json.dumps(seen))
"""
