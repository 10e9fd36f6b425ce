/// Types that are nothing but their bytes: `repr(C)` or a primitive, no padding, every bit pattern valid.
///
/// # Safety
/// The implementor has no padding, no pointers and no invalid bit patterns.
pub unsafe trait Plain: Copy + 'static {
    /// The value whose memory the first bytes are, when there are enough.
    fn read_from(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..size_of::<Self>())?;
        // SAFETY: the slice has the type's size, and the type has no invalid bit patterns.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }

    /// The value's memory.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: the type has no padding, so all of its bytes are initialised.
        unsafe { core::slice::from_raw_parts(core::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
}

// SAFETY: primitives and arrays of them have no padding and no invalid bit patterns.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: an array of plain elements has no padding between them.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// Declares a shared struct plain after checking at compile time that its fields, in order, fill it exactly.
macro_rules! plain {
    ($type:ty, $size:literal, { $($field:ident: $offset:literal),* $(,)? }) => {
        const _: () = {
            assert!(core::mem::size_of::<$type>() == $size);
            $(assert!(core::mem::offset_of!($type, $field) == $offset);)*
        };
        // SAFETY: repr(C), made of plain fields, and the assertions above leave no room for padding.
        unsafe impl $crate::Plain for $type {}
    };
}
pub(crate) use plain;
