use super::*;

const V4: &[Family] = &[Family::V4];
const V6: &[Family] = &[Family::V6];
const DUAL: &[Family] = &[Family::V4, Family::V6];

/// Policy and families of a new service, or the first thing that is wrong.
fn settled(spec: Value, cluster: &[Family]) -> Result<(String, Vec<String>), String> {
    changed(spec, None, cluster).map(|service| outcome(&service))
}

fn outcome(service: &Value) -> (String, Vec<String>) {
    let families = families(service).into_iter();
    (
        service.text("/spec/ipFamilyPolicy").to_owned(),
        families.map(|family| family.name().to_owned()).collect(),
    )
}

fn changed(spec: Value, old: Option<&Value>, cluster: &[Family]) -> Result<Value, String> {
    let mut service = json!({"metadata": {"name": "a"}, "spec": spec});
    service.default("/spec/type", "ClusterIP");
    link(&mut service, old);
    match settle(&mut service, old, cluster) {
        Ok(()) => Ok(service),
        Err(errors) => Err(format!("{}: {}", errors[0].field, errors[0].message)),
    }
}

#[test]
fn policies_and_families_follow_from_each_other_and_from_the_cluster() {
    let web = || json!({"a": "b"});
    for (spec, cluster, policy, expected) in [
        (json!({"selector": web()}), V4, SINGLE, &["IPv4"][..]),
        (json!({"selector": web()}), V6, SINGLE, &["IPv6"]),
        (json!({"selector": web()}), DUAL, SINGLE, &["IPv4"]),
        (json!({"ipFamilies": ["IPv6"]}), DUAL, SINGLE, &["IPv6"]),
        (json!({"ipFamilyPolicy": PREFER}), V4, PREFER, &["IPv4"]),
        (
            json!({"ipFamilyPolicy": PREFER}),
            DUAL,
            PREFER,
            &["IPv4", "IPv6"],
        ),
        (
            json!({"ipFamilyPolicy": REQUIRE, "ipFamilies": ["IPv6"]}),
            DUAL,
            REQUIRE,
            &["IPv6", "IPv4"],
        ),
        (
            json!({"ipFamilyPolicy": PREFER, "clusterIP": "fd00::5"}),
            DUAL,
            PREFER,
            &["IPv6", "IPv4"],
        ),
        (json!({"clusterIP": "fd00::5"}), DUAL, SINGLE, &["IPv6"]),
        // Headless without a selector: both families, on any cluster.
        (json!({"clusterIP": "None"}), V4, REQUIRE, &["IPv4", "IPv6"]),
        (
            json!({"clusterIP": "None", "selector": web()}),
            DUAL,
            SINGLE,
            &["IPv4"],
        ),
        (
            json!({"clusterIP": "None", "selector": web(), "ipFamilyPolicy": PREFER}),
            DUAL,
            PREFER,
            &["IPv4", "IPv6"],
        ),
    ] {
        let (got, families) = settled(spec.clone(), cluster).expect("settled");
        assert_eq!(
            (got.as_str(), &*families),
            (
                policy,
                &expected.iter().map(ToString::to_string).collect::<Vec<_>>()[..]
            ),
            "{spec}"
        );
    }
    let external = changed(json!({"type": "ExternalName"}), None, DUAL).expect("left alone");
    assert!(!external.has("/spec/ipFamilyPolicy"));
}

#[test]
fn what_the_cluster_cannot_give_is_refused() {
    for (spec, cluster, said) in [
        (
            json!({"ipFamilyPolicy": REQUIRE}),
            V4,
            r#"spec.ipFamilyPolicy: Invalid value: "RequireDualStack": this cluster is not configured for dual-stack services"#,
        ),
        (
            json!({"ipFamilies": ["IPv6"]}),
            V4,
            r#"spec.ipFamilies[0]: Invalid value: "IPv6": not configured on this cluster"#,
        ),
        (
            json!({"clusterIP": "fd00::5"}),
            V4,
            r#"spec.clusterIPs[0]: Invalid value: ["fd00::5"]: IPv6 is not configured on this cluster"#,
        ),
        (
            json!({"ipFamilies": ["IPv4", "IPv6"]}),
            DUAL,
            r#"spec.ipFamilyPolicy: Invalid value: "SingleStack": must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified"#,
        ),
        (
            json!({"ipFamilies": ["IPv4"], "clusterIP": "fd00::5"}),
            DUAL,
            r#"spec.clusterIPs[0]: Invalid value: "fd00::5": expected an IPv4 value as indicated by `ipFamilies[0]`"#,
        ),
        (
            json!({"ipFamilies": ["IPv4", "IPv4"], "ipFamilyPolicy": PREFER}),
            DUAL,
            r#"spec.ipFamilies[1]: Duplicate value: "IPv4""#,
        ),
        (
            json!({"clusterIPs": ["10.96.0.5"]}),
            DUAL,
            r#"spec.clusterIPs: Invalid value: ["10.96.0.5"]: must be empty when `clusterIP` is not specified"#,
        ),
        (
            json!({"clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "10.96.0.6"], "ipFamilyPolicy": PREFER}),
            DUAL,
            r#"spec.clusterIPs: Invalid value: ["10.96.0.5","10.96.0.6"]: may specify no more than one IP for each IP family"#,
        ),
        (
            json!({"clusterIP": "None", "clusterIPs": ["None", "10.96.0.6"]}),
            DUAL,
            r#"spec.clusterIPs: Invalid value: ["None","10.96.0.6"]: 'None' must be the first and only value"#,
        ),
    ] {
        assert_eq!(settled(spec, cluster).expect_err(said), said);
    }
}

/// A service of both families, as it is stored.
fn both(policy: &str) -> Value {
    json!({"metadata": {"name": "a"}, "spec": {"type": "ClusterIP", "ipFamilyPolicy": policy,
        "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "fd00::5"], "ipFamilies": ["IPv4", "IPv6"]}})
}

fn one() -> Value {
    json!({"metadata": {"name": "a"}, "spec": {"type": "ClusterIP", "ipFamilyPolicy": SINGLE,
        "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5"], "ipFamilies": ["IPv4"]}})
}

#[test]
fn a_second_family_comes_and_goes_by_the_policy() {
    let mut spec = one()["spec"].clone();
    spec["ipFamilyPolicy"] = PREFER.into();
    let grown = changed(spec, Some(&one()), DUAL).expect("a second family");
    assert_eq!(outcome(&grown).1, ["IPv4", "IPv6"]);
    assert_eq!(
        grown["spec"]["clusterIPs"],
        json!(["10.96.0.5"]),
        "given out later"
    );

    let mut spec = both(REQUIRE)["spec"].clone();
    spec["ipFamilyPolicy"] = SINGLE.into();
    let shrunk = changed(spec, Some(&both(REQUIRE)), DUAL).expect("the second goes");
    assert_eq!(shrunk["spec"]["clusterIPs"], json!(["10.96.0.5"]));
    assert_eq!(outcome(&shrunk).1, ["IPv4"]);
    let mut errors = Errors::new();
    validate_update(&shrunk, &both(REQUIRE), &mut errors);
    assert_eq!(errors, []);

    let mut spec = both(REQUIRE)["spec"].clone();
    spec["clusterIPs"] = json!(["10.96.0.5"]);
    let refused = changed(spec, Some(&both(REQUIRE)), DUAL).expect_err("no policy for it");
    assert!(refused.contains("must be 'SingleStack' to release the secondary cluster IP"));
}

#[test]
fn a_preference_is_not_looked_at_again_in_a_cluster_that_has_changed() {
    let old = both(PREFER);
    let kept = changed(old["spec"].clone(), Some(&old), V4).expect("left alone");
    assert_eq!(kept["spec"], old["spec"]);
    let old = both(REQUIRE);
    changed(old["spec"].clone(), Some(&old), V4).expect_err("the cluster cannot any more");
}

#[test]
fn clients_that_leave_addresses_out_keep_them_and_the_first_ones_stay() {
    let old = both(PREFER);
    let kept = changed(
        json!({"ipFamilyPolicy": PREFER, "ipFamilies": ["IPv4", "IPv6"]}),
        Some(&old),
        DUAL,
    );
    assert_eq!(
        kept.expect("kept")["spec"]["clusterIPs"],
        old["spec"]["clusterIPs"]
    );
    for (field, value) in [
        ("clusterIPs", json!(["10.96.0.6", "fd00::5"])),
        ("clusterIPs", json!(["10.96.0.5", "fd00::6"])),
        ("ipFamilies", json!(["IPv6", "IPv4"])),
        ("clusterIPs", json!([])),
    ] {
        let mut new = old.clone();
        new["spec"][field] = value.clone();
        let mut errors = Errors::new();
        validate_update(&new, &old, &mut errors);
        assert!(!errors.is_empty(), "{field}: {value}");
    }
}

#[test]
fn an_external_name_lets_go_of_what_was_carried_along() {
    let old = both(PREFER);
    let mut new = old.clone();
    new.set("/spec/type", "ExternalName");
    drop_for_external_name(&mut new, &old);
    assert_eq!(new["spec"], json!({"type": "ExternalName"}));
}
