// To be added to the app's build.gradle.kts: the release that exported model.pte.
dependencies {
    implementation("org.pytorch:executorch-android:@EXECUTORCH@")
}
