"""What AWS refuses, and what to do about it, in one line each."""

import re

JUST_ENDED = "; an instance that has just ended counts for some minutes more: then repeat the command"
# What AWS says where it has no machine of a kind now: another zone, type or hour may have one.
NO_ROOM = (
    "InsufficientInstanceCapacity",
    "InsufficientFreeAddressesInSubnet",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
    "Unsupported",
)
DENIED = "your credentials may not do this: docs/ec2.md has the policy they need"
INVALID = "your credentials are not valid: aws configure"
CLOCK = "this machine's clock is wrong: set it (Linux: timedatectl set-ntp true), then repeat the command"
FREE_PLAN = (
    "the account is on AWS's free plan, which has no such machine: upgrade it to the paid plan (Billing, Free Tier; "
    "credits stay valid), then ask for the vCPU quota that doctor names"
)
ADVICE = {
    "UnauthorizedOperation": DENIED,
    "AccessDenied": DENIED,
    "AccessDeniedException": DENIED,
    "AuthorizationError": DENIED,
    "VcpuLimitExceeded": "ask for a higher vCPU quota (tools/ec2.py doctor says which)" + JUST_ENDED,
    "MaxSpotInstanceCountExceeded": "ask for a higher spot vCPU quota (tools/ec2.py doctor says which)" + JUST_ENDED,
    "AuthFailure.ServiceLinkedRoleCreationNotPermitted": "spot needs a role that your credentials may not make; an "
    "administrator makes it once: aws iam create-service-linked-role --aws-service-name spot.amazonaws.com",
    "PendingVerification": "AWS is still checking this new account for this region: it mails when that is done, after "
    "minutes to hours; then repeat the command, or use another --region and a bucket there",
    "OptInRequired": "the account has not enabled EC2 here: finish signing up (a payment card, a phone number), or "
    "enable the region under Account, AWS Regions",
    "Blocked": "AWS has blocked the account: it says why in Support, Your support cases",
    "InsufficientInstanceCapacity": "no zone has one now: try later, another --instance or --region",
    "ExpiredToken": "your credentials have expired: log in again",
    "ExpiredTokenException": "your credentials have expired: log in again",
    "RequestExpired": "your credentials have expired, or " + CLOCK,
    "RequestTimeTooSkewed": CLOCK,
    "SignatureDoesNotMatch": "the secret key is not that of the access key (aws configure), or " + CLOCK,
    "InvalidSignatureException": "the secret key is not that of the access key (aws configure), or " + CLOCK,
    "InvalidClientTokenId": INVALID,
    "UnrecognizedClientException": INVALID,
    "AuthFailure": INVALID,
    "SlowDown": "S3 is busy: repeat the command in a minute",
    "RequestLimitExceeded": "the account asks AWS too often: repeat the command in a minute",
    "Throttling": "the account asks AWS too often: repeat the command in a minute",
    "BucketAlreadyExists": "bucket names are shared by all accounts: choose another name",
}
# What has no code of its own, by what AWS's message says.
SAID = {
    "not eligible for free tier": FREE_PLAN,
    "free plan": FREE_PLAN,
    "is not supported in your requested availability zone": "this zone has no such machine, and the launch tries all "
    "zones: choose another --instance or --region",
}


def advice_in(message):
    """What to do about an error that AWS tells as text, as its groups do; None where waiting may help."""
    words = set(re.split(r"[^A-Za-z.]+", message))
    if words & set(NO_ROOM):
        return None
    return said(message) or next((advice for code, advice in ADVICE.items() if code in words), None)


def said(message):
    """What to do about an answer that has no code of its own, or None."""
    return next((advice for text, advice in SAID.items() if text in message.lower()), None)
