"""Which model classes the auto mappings of the installed transformers name."""

from __future__ import annotations

import transformers
from transformers.models.auto import modeling_auto

GROUPS: dict[str, str] = {
    "base": "MODEL_MAPPING_NAMES",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq_lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image_text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "image_cls": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio_cls": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech_seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "text_enc": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "video_cls": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "depth": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "zero_shot_img": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "zero_shot_det": "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES",
    "segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "universal_seg": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "mask_generation": "MODEL_FOR_MASK_GENERATION_MAPPING_NAMES",
    "masked_image": "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES",
    "keypoint": "MODEL_FOR_KEYPOINT_MATCHING_MAPPING_NAMES",
    "multimodal_lm": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "time_series": "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES",
    "text_to_wave": "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
}


def class_names() -> list[tuple[str, str]]:
    """Every (group, class name), each class once, under the first group that names it."""
    seen: dict[str, str] = {}
    for group, mapping in GROUPS.items():
        for named in getattr(modeling_auto, mapping).values():
            for name in (named,) if isinstance(named, str) else named:
                seen.setdefault(name, group)
    return [(group, name) for name, group in seen.items()]


def model_class(name: str) -> type[transformers.PreTrainedModel]:
    """The class of that name, also when transformers does not export it at the top."""
    try:
        return getattr(transformers, name)
    except AttributeError:
        pass
    for mapping in GROUPS.values():
        for model_type, named in getattr(modeling_auto, mapping).items():
            if name in ((named,) if isinstance(named, str) else named):
                from transformers.models.auto.configuration_auto import model_type_to_module_name

                module = model_type_to_module_name(model_type)
                package = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[name])
                return getattr(package, name)
    raise LookupError(f"no auto mapping names {name}")
