"""Rewrites the syntax tree of a user's module so that what its lines compute is noted, and nothing it means changes.

`y = clip(x * 2)` becomes `y = H.assigned(3, H.result(2, H.function(2, clip)(H.argument(2, H.binary(1, "Mult", x, 2)))), "y")`, with H for
the hooks (skewless.programs.recorder) and a number for each place. Each hook returns what it was given, or does what the operator does, so
the program computes the same. A function is called from the user's own frame: `super()`, `locals()` and `warnings` see what they always do.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence
from typing import Any

from skewless.programs.trace import Site

# Not `__x`, which a class would change into `_Class__x`.
HOOKS = "__skewless__"
# They look at the frame or the names around them, and never return an array.
_UNTOUCHED = {"super", "locals", "globals", "vars", "dir", "eval", "exec"}
# They compile a function from its bytecode, in which they know no hooks.
_COMPILERS = {"numba"}
_TEXT = 160


class Rewriter(ast.NodeTransformer):
    """Rewrites one module. sites: the list of places that numbers refer to, shared by all modules of a program."""

    def __init__(self, source: str, file: str, sites: list[Site]):
        self._source, self._file, self._sites = source, file, sites
        self._lines = source.splitlines()
        self._inside: list[str] = []
        self._statement_line = 0
        self._compilers: set[str] = set()
        self._compiled: set[str] = set()
        self._lambdas: set[ast.expr] = set()

    def rewrite(self, tree: ast.Module) -> ast.Module:
        self._compilers = _imported(tree, _COMPILERS)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and self._is_compiler(node.func):
                self._compiled |= {arg.id for arg in node.args if isinstance(arg, ast.Name)}
                self._lambdas |= {arg for arg in node.args if isinstance(arg, ast.Lambda)}
        return ast.fix_missing_locations(self.visit(tree))

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt):
            self._statement_line = node.lineno
        return super().visit(node)

    # --- places and calls of hooks

    def _site(self, node: ast.expr | ast.stmt | ast.excepthandler, text: str | None = None) -> ast.Constant:
        if text is None:
            text = ast.get_source_segment(self._source, node) or ""
        text = " ".join(text.split())
        text = text if len(text) <= _TEXT else text[: _TEXT - 3] + "..."
        self._sites.append(
            Site(self._file, node.lineno, node.col_offset, text, ".".join(self._inside), self._statement_line)
        )
        return ast.Constant(len(self._sites) - 1)

    @staticmethod
    def _hook(name: str, at: ast.AST, *args: ast.expr) -> ast.expr:
        hook = ast.Attribute(ast.Name(HOOKS, ast.Load()), name, ast.Load())
        call = ast.copy_location(ast.Call(hook, list(args), []), at)
        # A method's call counts as being on the line where its name ends, which for a hook is to be where the expression begins.
        hook.lineno = hook.end_lineno = call.lineno
        hook.col_offset = hook.end_col_offset = call.col_offset
        return call

    def _statement(self, name: str, at: ast.AST, *args: ast.expr) -> ast.stmt:
        return ast.copy_location(ast.Expr(self._hook(name, at, *args)), at)

    def _visit(self, node: Any) -> Any:
        return None if node is None else self.visit(node)

    # --- expressions

    def visit_Call(self, node: ast.Call) -> ast.expr:
        site = self._site(node)
        called = node.func
        name = called.id if isinstance(called, ast.Name) else ""
        if isinstance(called, ast.Attribute):
            # Its own attribute is not noted: `x.mean` is no value, `x.mean()` is.
            function: ast.expr = ast.copy_location(
                ast.Attribute(self.visit(called.value), called.attr, called.ctx), called
            )
        else:
            function = self.visit(called)
        args: list[ast.expr] = []
        for arg in node.args:
            if isinstance(arg, ast.Starred):
                args.append(
                    arg
                    if name in _UNTOUCHED
                    else ast.copy_location(
                        ast.Starred(self._hook("starred", arg, site, self.visit(arg.value)), ast.Load()), arg
                    )
                )
            else:
                args.append(
                    self.visit(arg) if name in _UNTOUCHED else self._hook("argument", arg, site, self.visit(arg))
                )
        keywords = []
        for keyword in node.keywords:
            value = self.visit(keyword.value)
            if name not in _UNTOUCHED:
                extra = [] if keyword.arg is None else [ast.Constant(keyword.arg)]
                value = self._hook("argument" if extra else "mapping", keyword.value, site, value, *extra)
            keywords.append(ast.copy_location(ast.keyword(keyword.arg, value), keyword))
        if name in _UNTOUCHED:
            return ast.copy_location(ast.Call(function, args, keywords), node)
        noted = self._hook("function", node, site, function)
        call: ast.expr = ast.copy_location(ast.Call(noted, args, keywords), node)
        if isinstance(called, ast.Attribute):
            call = _at_name(call, called)
        return self._hook("result", node, site, call)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        site = self._site(node)
        operator = ast.Constant(type(node.op).__name__)
        return self._hook("binary", node, site, operator, self.visit(node.left), self.visit(node.right))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        if isinstance(node.op, ast.Not) or isinstance(node.operand, ast.Constant):
            self.generic_visit(node)
            return node
        site = self._site(node)
        return self._hook("unary", node, site, ast.Constant(type(node.op).__name__), self.visit(node.operand))

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        plain = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
        if len(node.ops) > 1 or not isinstance(node.ops[0], plain):
            self.generic_visit(node)
            return node
        site = self._site(node)
        operator = ast.Constant(type(node.ops[0]).__name__)
        return self._hook("binary", node, site, operator, self.visit(node.left), self.visit(node.comparators[0]))

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if not isinstance(node.ctx, ast.Load):
            self.generic_visit(node)
            return node
        site = self._site(node)
        if any(isinstance(part, ast.Starred) for part in ast.walk(node.slice)):
            self.generic_visit(node)
            return node
        return self._hook("item", node, site, self.visit(node.value), self._index(node.slice))

    def _index(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Slice):
            parts = [self._visit(part) or ast.Constant(None) for part in (node.lower, node.upper, node.step)]
            return self._hook("slice", node, *parts)
        if isinstance(node, ast.Tuple):
            return ast.copy_location(ast.Tuple([self._index(part) for part in node.elts], ast.Load()), node)
        return self.visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        value = node.value
        private = node.attr.startswith("__") and not node.attr.endswith("__")
        if not isinstance(node.ctx, ast.Load) or private:
            self.generic_visit(node)
            return node
        return _at_name(
            self._hook("attribute", node, self._site(node), self.visit(value), ast.Constant(node.attr)), node
        )

    def visit_comprehension(self, node: ast.comprehension) -> ast.comprehension:
        site = self._site(node.iter)
        iterated = self.visit(node.iter)
        if not node.is_async:
            iterated = self._hook("elements", node.iter, site, iterated)
        return ast.comprehension(node.target, iterated, [self.visit(test) for test in node.ifs], node.is_async)

    # --- statements

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AsyncFunctionDef:
        return self._function(node)

    def _is_compiler(self, node: ast.expr) -> bool:
        """Whether an expression is a decorator of a compiler, such as `njit`, `numba.njit` or `njit(cache=True)`."""
        if ast.unparse(node.func if isinstance(node, ast.Call) else node) == "torch.compile":
            return True
        while isinstance(node, ast.Attribute | ast.Call):
            node = node.value if isinstance(node, ast.Attribute) else node.func
        return isinstance(node, ast.Name) and node.id in self._compilers

    def _function(self, node: Any) -> Any:
        if node.name in self._compiled or any(map(self._is_compiler, node.decorator_list)):
            # A call of it is noted like one into a library.
            return node
        # Decorators and annotations stay as they are; defaults are values.
        node.args.defaults = [self.visit(default) for default in node.args.defaults]
        node.args.kw_defaults = [self._visit(default) for default in node.args.kw_defaults]
        node.body = self._within(node.name, node.body)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        if any(map(self._is_compiler, node.decorator_list)):
            return node
        node.body = self._within(node.name, node.body)
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        if node in self._lambdas:
            return node
        node.args.defaults = [self.visit(default) for default in node.args.defaults]
        node.args.kw_defaults = [self._visit(default) for default in node.args.kw_defaults]
        node.body = self.visit(node.body)
        return node

    def _within(self, name: str, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        self._inside.append(name)
        done = self._body(body)
        self._inside.pop()
        return done

    def _body(self, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        done: list[ast.stmt] = []
        for statement in body:
            new = self.visit(statement)
            done.extend(new if isinstance(new, list) else [new])
        return done

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.value = self._visit(node.value)
        if node.value is not None and isinstance(node.target, ast.Name):
            node.value = self._hook("assigned", node, self._site(node), node.value, ast.Constant(node.target.id))
        return node

    def visit_Assign(self, node: ast.Assign) -> Any:
        site = self._site(node)
        value = self.visit(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                value = self._hook("assigned", node, site, value, ast.Constant(target.id))
            elif isinstance(target, ast.Tuple) and all(isinstance(part, ast.Name) for part in target.elts):
                names = [ast.Constant(part.id) for part in target.elts if isinstance(part, ast.Name)]
                value = self._hook("unpacked", node, site, value, *names)
            elif isinstance(target, ast.Subscript) and _is_plain(target.value):
                value = self._hook("storing", node, site, value, _load(target.value))
            elif isinstance(target, ast.Attribute):
                value = self._hook("assigned", node, site, value, ast.Constant(ast.unparse(target)))
        node.value = value
        node.targets = [self.visit(target) for target in node.targets]
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        site = self._site(node)
        target = node.target
        value = self.visit(node.value)
        plain = _is_plain(target) or (
            isinstance(target, ast.Subscript) and _is_plain(target.value) and _is_plain_index(target.slice)
        )
        if not plain:
            node.value = value
            node.target = self.visit(target)
            return node
        operator = ast.Constant(type(node.op).__name__)
        if not isinstance(target, ast.Subscript):
            new = self._hook("inplace", node, site, operator, _load(target), value)
            return ast.copy_location(ast.Assign([target], new), node)
        container = _load(target.value)
        part = self._hook("item", node, self._site(node), container, self._index(_load(target.slice)))
        new = self._hook("inplace_part", node, site, operator, part, value, container)
        return ast.copy_location(ast.Assign([target], new), node)

    def visit_For(self, node: ast.For) -> Any:
        site = self._site(node.iter)
        node.iter = self._hook("elements", node.iter, site, self.visit(node.iter))
        node.target = self.visit(node.target)
        node.body, node.orelse = self._body(node.body), self._body(node.orelse)
        return node

    def visit_Match(self, node: ast.Match) -> Any:
        node.subject = self.visit(node.subject)
        for case in node.cases:
            case.guard = self._visit(case.guard)
            case.body = self._body(case.body)
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> Any:
        site = self._site(node, self._lines[node.lineno - 1])
        node.type = self._visit(node.type)
        node.body = [self._statement("caught", node, site), self._noting_escape(node, site, self._body(node.body))]
        return node

    def visit_With(self, node: ast.With) -> Any:
        """`with suppress(...)` swallows, too: an exception reaches the end of the block and does not leave the statement."""
        site = self._site(node, self._lines[node.lineno - 1])
        node.items = [self.visit(item) for item in node.items]
        arrived = [self._statement("caught", node, site), ast.copy_location(ast.Raise(None, None), node)]
        handler = ast.copy_location(ast.ExceptHandler(ast.Name("BaseException", ast.Load()), None, arrived), node)
        node.body = [ast.copy_location(ast.Try(self._body(node.body), [handler], [], []), node)]
        return self._noting_escape(node, site, [node])

    def _noting_escape(self, node: ast.AST, site: ast.expr, body: list[ast.stmt]) -> ast.stmt:
        """The statements, with a note when an exception leaves them."""
        left = [self._statement("escaped", node, site), ast.copy_location(ast.Raise(None, None), node)]
        handler = ast.copy_location(ast.ExceptHandler(ast.Name("BaseException", ast.Load()), None, left), node)
        return ast.copy_location(ast.Try(body, [handler], [], []), node)


def _imported(tree: ast.Module, packages: set[str]) -> set[str]:
    """The names that a module's imports from some packages bind."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                each.asname or each.name.partition(".")[0]
                for each in node.names
                if each.name.partition(".")[0] in packages
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in packages:
            names |= {each.asname or each.name for each in node.names}
    return names


def _at_name(new: ast.expr, attribute: ast.Attribute) -> ast.expr:
    """With `.mean` on a line of its own, a traceback names that line, and not the one on which the expression begins."""
    line, end = attribute.end_lineno, attribute.end_col_offset
    assert line is not None and end is not None
    new.lineno, new.col_offset = line, end - len(attribute.attr)
    if isinstance(new, ast.Call) and isinstance(new.func, ast.Attribute):
        new.func.lineno = new.func.end_lineno = line
        new.func.col_offset = new.func.end_col_offset = new.col_offset
    return new


def _is_plain(node: ast.expr) -> bool:
    """A name, or attributes of one: reading it twice does nothing twice."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _is_plain_index(node: ast.expr) -> bool:
    allowed = (ast.Name, ast.Constant, ast.Slice, ast.Tuple, ast.Load, ast.UnaryOp, ast.USub)
    return all(isinstance(part, allowed) for part in ast.walk(node))


def _load(node: ast.expr) -> ast.expr:
    """The same expression, read instead of written."""
    read = copy.deepcopy(node)
    for part in ast.walk(read):
        if hasattr(part, "ctx"):
            part.ctx = ast.Load()
    return read
