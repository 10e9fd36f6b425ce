//! A few of something, which as a rule is one: that one needs no memory of its own.

use std::ops::Deref;

#[derive(Clone, Debug, Default)]
pub enum Few<T> {
    #[default]
    None,
    One(T),
    Many(Box<[T]>),
}

impl<T> Few<T> {
    pub fn into_vec(self) -> Vec<T> {
        match self {
            Few::None => Vec::new(),
            Few::One(one) => vec![one],
            Few::Many(many) => many.into_vec(),
        }
    }
}

impl<T> From<Vec<T>> for Few<T> {
    fn from(mut all: Vec<T>) -> Self {
        match (all.len(), all.pop()) {
            (_, None) => Few::None,
            (1, Some(one)) => Few::One(one),
            (_, Some(last)) => {
                all.push(last);
                Few::Many(all.into())
            }
        }
    }
}

impl<T> Deref for Few<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Few::None => &[],
            Few::One(one) => std::slice::from_ref(one),
            Few::Many(many) => many,
        }
    }
}

impl<T: PartialEq> PartialEq for Few<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_what_it_was_made_of() {
        for count in 0..4 {
            let all: Vec<u32> = (0..count).collect();
            let few = Few::from(all.clone());
            assert_eq!(*few, *all);
            assert_eq!(few.into_vec(), all);
        }
    }
}
