"""The attribution report: one page for people, one document for programs, tied together by digests."""
