"""A pre-trained model with its processor and its anatomy."""

from graftkit.backbone.anatomy import Site
from graftkit.backbone.backbone import Backbone
from graftkit.backbone.parts import find_sites
from graftkit.backbone.sites import select, select_parameters

__all__ = ["Backbone", "Site", "find_sites", "select", "select_parameters"]
