"""Group questions by the pages that they are about."""

from collections.abc import Hashable, Iterable, Sequence


def group_by_page(page_ids: Iterable[Hashable], max_size: int | None = None) -> list[list[int]]:
    """Group questions about the same page, pages in the order of their first question.

    Args:
        page_ids: the page key of each question.
        max_size: the largest group; a page with more questions has several groups.

    Returns:
        The indices of each group's questions, ascending.
    """
    pages: dict[Hashable, list[int]] = {}
    for index, page_id in enumerate(page_ids):
        pages.setdefault(page_id, []).append(index)
    if max_size is None:
        return list(pages.values())
    return [page[start : start + max_size] for page in pages.values() for start in range(0, len(page), max_size)]


def group_by_shared_pages(page_ids: Sequence[tuple[Hashable, ...]]) -> list[list[int]]:
    """Group questions so that no two groups have a page in common (connected components, by union-find).

    Args:
        page_ids: the keys of each question's pages.

    Returns:
        The indices of each group's questions, ascending.
    """
    parents: dict[Hashable, Hashable] = {}

    def find_root(page: Hashable) -> Hashable:
        while (parent := parents.setdefault(page, page)) != page:
            parents[page] = page = parents[parent]
        return page

    for pages in page_ids:
        for page in pages[1:]:
            parents[find_root(page)] = find_root(pages[0])
    return group_by_page(find_root(pages[0]) for pages in page_ids)
