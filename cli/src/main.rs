//! The command line of Pando.

fn main() {}
