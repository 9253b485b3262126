"""L1: functions, modules and operators' symbolics swapped for the time of an export, by backend, and checked."""

from torchferry.rewrite.checkers import LibVersionChecker
from torchferry.rewrite.context import RewriterContext, explain, patch_model
from torchferry.rewrite.function import FUNCTION_REWRITER, FunctionRewriter
from torchferry.rewrite.log import RewriteLog, RewriteRow
from torchferry.rewrite.module import MODULE_REWRITER, ModuleRewriter
from torchferry.rewrite.state import FunctionContext
from torchferry.rewrite.symbolic import SYMBOLIC_REWRITER, Symbolic, SymbolicRewriter, register_op

__all__ = [
    "FUNCTION_REWRITER",
    "MODULE_REWRITER",
    "SYMBOLIC_REWRITER",
    "FunctionContext",
    "FunctionRewriter",
    "LibVersionChecker",
    "ModuleRewriter",
    "RewriteLog",
    "RewriteRow",
    "RewriterContext",
    "Symbolic",
    "SymbolicRewriter",
    "explain",
    "patch_model",
    "register_op",
]
