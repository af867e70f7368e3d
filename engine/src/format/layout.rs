//! The fields of the fixed structures, for tests that change each of them. The lists are made of the
//! structures themselves, and a list that leaves a byte out does not compile.

/// A field of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Its first byte in the structure.
    pub offset: usize,
    /// Its bytes.
    pub bytes: usize,
    /// Bytes of one of its elements, if it is an array; else its own.
    pub element: usize,
}

/// Bytes of what `_field` picks out of a structure.
pub(super) const fn bytes_of<S, F>(_field: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

/// Whether `fields` cover a structure of `bytes` bytes in order, without a gap.
pub(super) const fn covers(fields: &[Field], bytes: usize) -> bool {
    let (mut end, mut at) = (0, 0);
    while at < fields.len() {
        let Field { offset, bytes, element, .. } = fields[at];
        if offset != end || element == 0 || !bytes.is_multiple_of(element) {
            return false;
        }
        end = offset + bytes;
        at += 1;
    }
    end == bytes
}

/// The fields of a structure, in their order; the type in brackets is that of an array's elements.
macro_rules! fields {
    ($structure:ty: $($name:ident $([$element:ty])?),+ $(,)?) => {{
        const LIST: &[$crate::format::layout::Field] = &[$({
            let bytes = $crate::format::layout::bytes_of(|s: &$structure| &s.$name);
            let elements: &[usize] = &[$(size_of::<$element>(),)? bytes];
            $crate::format::layout::Field {
                name: stringify!($name),
                offset: core::mem::offset_of!($structure, $name),
                bytes,
                element: elements[0],
            }
        }),+];
        const _: () = assert!($crate::format::layout::covers(LIST, size_of::<$structure>()));
        LIST
    }};
}
pub(super) use fields;
