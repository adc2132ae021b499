"""A model out of a folder that transformers wrote, or out of the hub: its class, its weights, and what reads for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from heedful.core.errors import HeedfulError, ModelError, first_line
from heedful.core.kinds.loaded import Loaded

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
log = logging.getLogger(__name__)


@contextmanager
def reading(where: str | Path, name: str) -> Iterator[None]:
    """No progress bars for local files, and one plain error for all that is wrong with a model's files."""
    try:
        with quiet(Path(where).is_dir()):
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


def pretrained(where: str | Path, name: str, kind: type[PreTrainedModel] | None = None, **kw: Any) -> Loaded:
    """The model of a folder or a hub id, as its config names its class, or as a class of ours."""
    from heedful.adapters.saving import saved_with
    from heedful.engine.learned import PREFIX

    hub = hub_arguments(where, kw)
    with reading(where, name):
        config = AutoConfig.from_pretrained(where, **hub)
        own: Any = kind or getattr(transformers, _auto_class(config))
        model, found = own.from_pretrained(where, **kw | hub, output_loading_info=True)
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


@contextmanager
def quiet(local: bool) -> Iterator[None]:
    """No progress bars for local files; those of downloads stay."""
    if not local or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
