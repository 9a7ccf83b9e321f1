"""Messages that travel back through a function, by rules; gradients are one kind."""

from ._interpreter import propagate as propagate
from ._rules import Operation as Operation, Rule as Rule, Rules as Rules, VJP as VJP
from ._tag import tag as tag, tag_info as tag_info
