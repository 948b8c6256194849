"""The names of Caffe2's checkpoints, as Detectron2 calls the same parameters.

The ImageNet weights that Detectron2 starts from are of this kind (MSRA R-50.pkl), and the zoo of Detectron, its
predecessor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# In this order: later patterns read what earlier ones wrote.
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"_", "."),
        (r"\.b$", ".bias"),
        (r"\.w$", ".weight"),
        (r"\.(?:bn|gn)\.(?:s|gamma)$", ".norm.weight"),
        (r"\.(?:bn|gn)\.(?:bias|beta)$", ".norm.bias"),
        (r"\.bn\.(?:rm|running\.mean)$", ".norm.running_mean"),
        (r"\.bn\.(?:riv|running\.var)$", ".norm.running_var"),
        # backbone
        (r"^res\.conv1\.norm\.", "conv1.norm."),
        (r"^conv1\.", "stem.conv1."),
        (r"\.branch1\.", ".shortcut."),
        (r"\.branch2a\.", ".conv1."),
        (r"\.branch2b\.", ".conv2."),
        (r"\.branch2c\.", ".conv3."),
        # pyramid: fpn_inner_res4_5_sum_lateral_w, fpn_res4_5_sum_w; the coarsest inner one has no "lateral"
        (r"^fpn\.inner\.res(\d)\.\d+\.sum(?:\.lateral)?\.", r"fpn_lateral\1."),
        (r"^fpn\.res(\d)\.\d+\.sum\.", r"fpn_output\1."),
        # proposals; with a pyramid the head is named after the finest level
        (r"^conv\.rpn(?:\.fpn2)?\.", "rpn_head.conv."),
        (r"^rpn\.bbox\.pred(?:\.fpn2)?\.", "rpn_head.anchor_deltas."),
        (r"^rpn\.cls\.logits(?:\.fpn2)?\.", "rpn_head.objectness_logits."),
        # heads of the regions
        (r"^bbox\.pred\.", "box_predictor.bbox_pred."),
        (r"^cls\.score\.", "box_predictor.cls_score."),
        (r"^fc6\.", "box_head.fc1."),
        (r"^fc7\.", "box_head.fc2."),
        (r"^head\.conv", "box_head.conv"),
        (r"^\.\[mask\]\.fcn", "mask_head.mask_fcn"),
        (r"^conv5\.mask\.", "mask_head.deconv."),
        (r"^mask\.fcn\.logits\.", "mask_head.predictor."),
        (r"^conv\.fcn", "keypoint_head.conv_fcn"),
        (r"^kps\.score\.lowres\.", "keypoint_head.score_lowres."),
    )
)
# ImageNet's classifier, which no detector has, and the fixed weights that enlarge heat maps.
_UNUSED = ("fc1000_w", "fc1000_b", "pred_w", "pred_b", "kps_score_w", "kps_score_b")


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give parameters Detectron2's names, without what stands before `stem`, `rpn_head`, `box_head` and the like."""
    renamed = {}
    for old, value in state.items():
        if old in _UNUSED or old.endswith("_momentum") or (old == "conv1_b" and not value.any()):
            continue  # the stem has a bias of zeros, and its batch norm another
        name = old
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        renamed[name] = _reorder_classes(name, value)
    return renamed


def _reorder_classes(name: str, value: Tensor) -> Tensor:
    """Move the background, which Caffe2 has as class 0, behind the others, or leave it out where it means nothing."""
    if name.startswith("box_predictor.cls_score."):
        return torch.cat((value[1:], value[:1]))
    if name.startswith("box_predictor.bbox_pred."):
        return value[4:]
    return value[1:] if name.startswith("mask_head.predictor.") else value
