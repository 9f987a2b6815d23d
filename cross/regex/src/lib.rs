//! regex-lite under the name of regex. libcontainer and oci-spec check a handful of short fields
//! with regular expressions, none of which neap fills from outside; for that regex, with its
//! tables of Unicode and its automata, is half a megabyte of the program on the gateway.
//!
//! Left out: Unicode classes. `\w` is `[0-9A-Za-z_]` here, as in the kernel's own interface
//! (resctrl) and in the image references that those expressions are about.

pub use regex_lite::*;
