// The same eight values of k of two neighbouring columns.
struct Pair { a: Eight, b: Eight }
struct Columns { a: u32, b: u32 }
